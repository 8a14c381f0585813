import pytest

from lem.results.schema import ExperimentRow
from lem.spec.experiment import Energy, Experiment
from lem.studies.earlier import mean_energy_j, mean_time_s


def row(**values):
    return ExperimentRow(**{name: values.get(name) for name in ExperimentRow.__struct_fields__})


def test_the_time_and_energy_of_a_run_are_those_of_all_its_cycles():
    experiment = Experiment(model="any", cycles=4, energy=Energy(idle_s=5))
    one = row(duration_s=10.0, warmup_duration_s=1.0, load_duration_s=3.0, energy_j=100.0, idle_power_before_w=7.0)
    other = row(duration_s=12.0, warmup_duration_s=1.0, load_duration_s=3.0, energy_j=None)
    assert mean_time_s(experiment, [one]) == 2 * 5 + 3 + 4 * 11
    # The second run measured no idle power, so it had no idle phases.
    assert mean_time_s(experiment, [one, other]) == pytest.approx((57 + 55) / 2)
    assert mean_energy_j(experiment, [one, other]) == 400


def test_nothing_is_known_without_earlier_runs():
    experiment = Experiment(model="any")
    assert mean_time_s(experiment, []) is None
    assert mean_energy_j(experiment, [row(duration_s=1.0)]) is None
