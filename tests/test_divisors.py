import time

import pytest

from powertrain.divisors import divisors
from powertrain.training.config import TrainerConfig


@pytest.mark.parametrize("number", [1, 2, 7, 12, 36, 97, 360])
def test_divisors_are_all_there_in_order(number):
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_a_sentence_that_lists_divisors_does_not_look_at_every_number():
    began = time.process_time()
    with pytest.raises(ValueError, match=r"does not divide the 1,000,000,000 sequences .* allowed are 1, 2, 4, 5, "):
        TrainerConfig(global_batch_tokens=64_000_000_000, context_length=64, micro_batch_size=7)
    assert time.process_time() - began < 5  # some 0.01 s; to look at every number takes 45 s
