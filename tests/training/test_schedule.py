from pml_adversarial.training.schedule import EpsSchedule


def test_grows_over_the_warmup():
    schedule = EpsSchedule(warmup=4)
    assert [schedule.at(step) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]


def test_is_whole_without():
    assert EpsSchedule().at(0) == 1
