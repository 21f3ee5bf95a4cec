import torch, time
from torch import nn
from torch.nn import functional as F
from pml_adversarial.training.tracing import *
from pml_adversarial.training import tracing
from pml_adversarial.training.tracing import _tracer
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
from pml_adversarial.training.replay2 import Replay
from pml_adversarial.training.pixels import PixelSpace
def check(name,make):
    w.wants_random_state=True
    out=make()
    outs=list(out) if isinstance(out,(tuple,list)) else [out]
    try: r=Replay(outs,PixelSpace())
    except Exception as e: print(f"{name:20s}",type(e).__name__,e); return
    given=torch.cat(r._given)
    rows=(r.rows.source>=0).nonzero().flatten()
    e=r.embed(r.inputs)
    some=torch.cat([rows.flip(0)[:5],rows[:3],rows[:3]])
    pos={int(k):i for i,k in enumerate(rows)}
    e2=r.embed(r.inputs[[pos[int(k)] for k in some]],some)
    print(f"{name:20s} difference {r.difference():.1e} all {float((e-given[rows]).abs().max()):.1e} some {float((e2-given[some]).abs().max()):.1e} apart {r.rows.apart} in order {r.rows.in_order} modules {len(r.modules)}")
def check_old(name,make):
    out=make()
    outs=list(out) if isinstance(out,(tuple,list)) else [out]
    if not all(type(o) is Traced for o in outs): print(name,"NOT TRACED"); return
    refs=[o.made_by for o in outs]
    again=run(refs)
    ok=all(torch.allclose(a,o.detach().as_subclass(torch.Tensor),atol=1e-6) for a,o in zip(again,outs))
    # rows
    sources=[s for s in steps_of(refs) if s.is_module and not s.refs]
    code={s:sum(len(q.outputs[0]) for q in sources[:i]) for i,s in enumerate(sources)}
    total=sum(len(s.outputs[0]) for s in sources)
    bits=max(1,(total-1).bit_length())
    def with_nan(bit,val):
        def call(s,args,kwargs):
            if not s.is_module: return apply(s,args,kwargs)
            if s in code:
                n=len(s.outputs[0]); idx=torch.arange(n)+code[s]; m=((idx>>bit)&1)==val
            else:
                t=[a for a in tensors_in((args,kwargs)) if a.is_floating_point() and a.requires_grad or True][0]
                m=t.flatten(1).isnan().any(1)
            return [o.masked_fill(m.view(-1,*[1]*(o.ndim-1)),float("nan")) if o.is_floating_point() else o for o in s.outputs]
        return call
    with torch.no_grad():
        got=[[torch.cat([o.flatten(1).isnan().any(1) for o in run(refs,with_nan(b,v))]) for v in (0,1)] for b in range(bits)]
    zero=torch.stack([g[0] for g in got]); one=torch.stack([g[1] for g in got])
    unique=(zero^one).all(0); none=~(zero|one).any(0)
    row=sum((one[b].long()<<b) for b in range(bits))
    print(f"{name:28s} replay {'exact' if ok else 'DIFFERS'}; steps {[getattr(s.function,'__name__',type(s.function).__name__) for s in steps_of(refs)]}; unique {unique.all().item()} none {none.any().item()} rows {row.tolist()[:20]}")
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
o=m(x); print(type(o)); del o
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
print("hooks",tracing._hooks)
t=time.perf_counter()
for _ in range(200): e=F.normalize(m(x))
b=time.perf_counter()-t
print("ms per step",1000*a/200,1000*b/200)
