import math
import re

import pytest

from powertrain.training.config import BudgetConfig, DebugConfig, ScheduleConfig, TrainerConfig
from powertrain.training.length import TrainingLength, amount, check_epochs, plan_lines, resolve_length
from powertrain.training.schedules import Schedule

LENGTH = TrainingLength(steps=100, tokens_per_step=1000, flops_per_token=50.0, reason="")


def curve(length=LENGTH, **config):
    schedule = Schedule(ScheduleConfig(**config), length)
    return [schedule.multiplier(step) for step in range(length.steps + 1)]


def test_wsd_rises_stays_and_falls():
    values = curve(warmup=0.1, decay=0.2, shape="linear", final=0.1)
    assert values[0] == pytest.approx(0.1)
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert values[10:81] == [1.0] * 71
    assert values[90] == pytest.approx(0.55)
    assert values[100] == pytest.approx(0.1)


def test_one_minus_sqrt_falls_faster_at_first():
    values = curve(warmup=0.0, decay=0.5, shape="1-sqrt")
    for step in (51, 60, 99, 100):
        assert values[step] == pytest.approx(1 - math.sqrt((step - 50) / 50))


def test_cosine_reaches_half_way_between_peak_and_final_in_the_middle():
    values = curve(kind="cosine", warmup=0.2, final=0.2)
    assert values[20] == 1.0
    assert values[60] == pytest.approx(0.6)
    assert values[100] == pytest.approx(0.2)
    assert values[20:] == sorted(values[20:], reverse=True)


def test_constant_stays():
    assert curve(kind="constant", warmup=0.0) == [1.0] * 101


def test_amounts_above_one_are_in_the_unit():
    fractions = curve(warmup=0.1, decay=0.2)
    assert curve(warmup=10, decay=20, unit="steps") == pytest.approx(fractions)
    assert curve(warmup=10_000, decay=20_000, unit="tokens") == pytest.approx(fractions)
    assert curve(warmup=500_000, decay=1_000_000, unit="flops") == pytest.approx(fractions)


def test_the_curve_over_progress_does_not_depend_on_the_batch():
    half = TrainingLength(steps=200, tokens_per_step=500, flops_per_token=50.0, reason="")
    coarse, fine = curve(warmup=0.0, decay=0.3), curve(half, warmup=0.0, decay=0.3)
    assert fine[::2] == pytest.approx(coarse)


def test_a_run_prolonged_before_its_decay_keeps_its_rates_where_the_warmup_is_an_amount():
    longer = TrainingLength(steps=1000, tokens_per_step=1000, flops_per_token=50.0, reason="")
    assert curve(longer, warmup=2000)[:81] == curve(warmup=2000)[:81]
    assert curve(warmup=0.02)[9] == 1.0
    assert curve(longer, warmup=0.02)[9] == 0.5


def test_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"take 120 steps, but the run has only 100"):
        Schedule(ScheduleConfig(warmup=100_000, decay=20_000, unit="tokens"), LENGTH)


def resolve(budget=None, debug=None, flops_per_token=1e6, **trainer):
    return resolve_length(
        TrainerConfig(context_length=64, global_batch_tokens=6400, **trainer),
        budget or BudgetConfig(),
        debug or DebugConfig(),
        flops_per_token=flops_per_token,
        num_parameters=64_000,
    )


def test_each_budget_becomes_steps_rounded_up():
    assert resolve(max_steps=7).steps == 7
    assert resolve(max_tokens=6401).steps == 2
    assert resolve(max_tokens=6400).steps == 1
    assert resolve(BudgetConfig("steps", 3.5)).steps == 4
    assert resolve(BudgetConfig("flops", 6400 * 1e6 * 3)).steps == 3
    assert resolve(BudgetConfig("flops", 6400 * 1e6 * 3.01)).steps == 4


def test_whole_multiples_never_gain_a_step_by_rounding():
    for steps in (1, 3, 7, 997, 123_457):
        for flops in (1e6 / 3, 0.1, 6.02e23):
            assert resolve(BudgetConfig("flops", flops * 6400 * steps), flops_per_token=flops).steps == steps


def test_without_a_budget_twenty_tokens_per_parameter_are_trained_and_said():
    length = resolve()
    assert length.steps == 20 * 64_000 // 6400
    assert "20 tokens per parameter" in length.reason
    assert length.tokens == 20 * 64_000
    assert length.flops == pytest.approx(20 * 64_000 * 1e6)


def test_debug_caps_and_never_extends():
    assert resolve(debug=DebugConfig(max_steps=3)).steps == 3
    assert resolve(debug=DebugConfig(max_steps=3), max_steps=2).steps == 2


def test_two_budgets_are_refused():
    with pytest.raises(ValueError, match=r"trainer\.max_steps=5 and budget\.value=1e\+15 are all given"):
        resolve(BudgetConfig("flops", 1e15), max_steps=5)


def test_amounts():
    assert [amount(v) for v in (0, 950, 12_345, 999_999, 4.56e6, 1.2e10)] == ["0", "950", "12.3k", "1M", "4.56M", "12G"]


def test_the_plan_of_a_run_warns_of_many_epochs_and_of_no_others():
    (plan,) = plan_lines(LENGTH, train_tokens=25_000)
    assert plan.startswith("plan    100 steps of 1,000 tokens = 100k tokens (4.00 epochs), 5e+06 FLOPs")
    (plan,) = plan_lines(LENGTH, train_tokens=None)
    assert "data not prepared yet" in plan
    _, warning = plan_lines(LENGTH, train_tokens=20_000)
    assert warning.startswith("warning the run goes 5.0 times over its data")


def test_a_length_that_nobody_gave_is_refused_where_it_repeats_the_data_for_nothing():
    length = resolve()  # 200 steps of 6400 tokens
    check_epochs(length, train_tokens=32_000)
    with pytest.raises(ValueError, match="no budget is given") as caught:
        check_epochs(length, train_tokens=31_999)
    sentence = str(caught.value)
    assert "would be 40 epochs of the 32k training tokens: give trainer.max_tokens=25600 for one epoch" in sentence
    one, four = (int(value) for value in re.findall(r"trainer\.max_tokens=(\d+)", sentence))
    # With them it is neither refused nor warned of.
    for tokens, epochs in ((one, 1), (four, 4)):
        taken = resolve(max_tokens=tokens)
        assert taken.tokens == tokens
        assert epochs - 0.5 < taken.tokens / 31_999 <= epochs
        assert len(plan_lines(taken, 31_999)) == 1
    # What was asked for is done, with a warning.
    for asked in (resolve(max_steps=200), resolve(BudgetConfig("steps", 200)), resolve(debug=DebugConfig(max_steps=9))):
        check_epochs(asked, train_tokens=64)
        assert plan_lines(asked, train_tokens=64)[1].startswith("warning the run goes ")


def test_data_of_less_than_a_step_are_given_one():
    with pytest.raises(ValueError, match=r"max_tokens=6400 for one epoch, trainer\.max_tokens=6400 for 4"):
        check_epochs(resolve(), train_tokens=640)
