import torch, time
from torch import nn
from torch.nn import functional as F
from contextlib import *
from pml_adversarial.training.tracing import *
from pml_adversarial.training import tracing
torch.manual_seed(0)
net=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64,32), nn.ReLU(), nn.Linear(32,16))
x=torch.rand(16,1,8,8)
w=Watch()
def steps_of(refs):
    seen={}
    todo=[r.step for r in refs]
    while todo:
        s=todo.pop()
        if s.number not in seen:
            seen[s.number]=s; todo+= [r.step for r in s.refs]
    return [seen[k] for k in sorted(seen)]
from contextlib import contextmanager
def apply(step,args,kwargs):
    with ExitStack() as st:
        now=dict(tracing.autocast_state()); then=dict(step.autocast)
        for kind in {*now,*then}:
            if now.get(kind)!=then.get(kind):
                st.enter_context(torch.autocast(kind,enabled=kind in then,dtype=then.get(kind)))
        if step.in_place:
            a=args[0].clone(); step.function(a,*args[1:],**kwargs); return [a]
        f=step.function
        if step.is_module and step.swapped: return tensors_in(torch.func.functional_call(f,step.swapped,args,kwargs))
        return tensors_in(f(*args,**kwargs))
def run(refs,call=apply):
    memo={}
    def res(l):
        if isinstance(l,Ref): return memo[l.step][l.place]
        if isinstance(l,Fixed): return l.value
        return l
    with paused():
        for s in steps_of(refs):
            memo[s]=call(s,mapped(s.args,res),mapped(s.kwargs,res))
    return [memo[r.step][r.place] for r in refs]
from pml_adversarial.training.replay import Replay
from pml_adversarial.training.pixels import PixelSpace
def check(name,make):
    w.wants_random_state=True
    out=make()
    outs=list(out) if isinstance(out,(tuple,list)) else [out]
    try: r=Replay([tracing.ref_of(o) for o in outs],PixelSpace())
    except Exception as e: print(f"{name:20s}",type(e).__name__,e); return
    given=torch.cat([o.detach() for o in outs])
    P=r.num_known
    e=r.embed(r.inputs).detach()
    rows=torch.arange(P)
    some=torch.cat([rows.flip(0)[:5],rows[:3],rows[:3]])
    e2=r.embed(r.inputs[some],some).detach()
    print(f"{name:20s} difference {r.difference(given):.1e} all {float((e-given[:P]).abs().max()):.1e} some {float((e2-given[some]).abs().max()):.1e} apart {r._rows.apart} in order {r._rows.in_order} modules {len(r.modules)} P {P}")
if 0:
 pass
m=net(); m2=net()
class Two(nn.Module):
    def __init__(s): super().__init__(); s.a,s.b=net(),net()
    def forward(s,x=None,y=None): return {"pooled": s.a(x) if x is not None else s.b(y), "n":3}
two=Two()
check("plain",lambda: m(x))
check("normalize",lambda: F.normalize(m(x)))
check("norm div",lambda: (lambda e: e/e.norm(dim=1,keepdim=True))(m(x)))
check("dict kw",lambda: two(y=x)["pooled"].float())
check("chunk",lambda: m(torch.cat([x,x.flip(3)])).chunk(2))
check("cat3",lambda: torch.cat([m(x[:4]),m2(x[4:]),m(x[:2])]))
check("mask",lambda: m(x)[torch.arange(16)%3==0])
check("pick",lambda: m(x)[torch.randperm(16)])
check("stack.flatten",lambda: torch.stack([m(x),m(x.flip(3))],1).flatten(0,1))
check("mean of two",lambda: (m(x)+m(x.flip(3)))/2)
check("batch centre",lambda: (lambda e: e-e.mean(0))(m(x)))
check("in place",lambda: m(x).mul_(2).add_(1))
def setitem():
    b=torch.zeros(16,16); b[:8]=m(x[:8]); b[8:]=m2(x[8:]); return b
check("setitem",setitem)
def iadd():
    e=m(x); e+=1; e/=e.norm(dim=1,keepdim=True); return e
check("iadd",iadd)
def ac():
    with torch.autocast("cpu",dtype=torch.bfloat16): e=m(x)
    return e.float()
check("autocast",ac)
head=nn.Linear(16,8)
check("chain",lambda: head(m(x).relu()))
check("matmul",lambda: m(x)@torch.rand(16,4))
check("proj T",lambda: (torch.rand(4,16)@m(x).T).T)
fast={k:(v+.1).detach().requires_grad_() for k,v in m.named_parameters()}
check("functional_call",lambda: torch.func.functional_call(m,fast,(x,)))
lin=nn.Linear(16,8)
check("method tail", lambda: F.linear(m(x),lin.weight,lin.bias))
check("split list", lambda: torch.cat(m(x).split([4,12])[::-1]))
check("unbind", lambda: torch.stack([r for r in m(x)]))
check("iter", lambda: torch.cat([r[None] for r in m(x)]))
check("columns", lambda: m(x)[:, :8])
check("einsum", lambda: torch.einsum("nd,dk->nk",m(x),torch.rand(16,4)))
check("layer_norm", lambda: F.layer_norm(m(x),(16,)))
check("where", lambda: torch.where(torch.arange(16)[:,None]<8,m(x),m2(x)))
check("view", lambda: m(x).view(8,2,16).reshape(16,16))
check("amax views", lambda: m(x).view(8,2,16).amax(1))

c=torch.compile(m,backend="eager")
check("compiled", lambda: F.normalize(c(x)))
m3=net(); m3.compile(backend="eager")
check("compile()", lambda: F.normalize(m3(x)))
tail=torch.compile(lambda e: F.normalize(e)*2,backend="eager")
check("compiled tail", lambda: tail(m(x)))
# time
opt=m
t=time.perf_counter()
for _ in range(200): e=F.normalize(m(x))
a=time.perf_counter()-t
del w
m(x)

t=time.perf_counter()
for _ in range(200): e=F.normalize(m(x))
b=time.perf_counter()-t
print("ms per step",1000*a/200,1000*b/200)
