"""`trainable`: what trains, and that the rest does not."""

import pytest

from pipeline.errors import RequestError
from pipeline.params import LastFraction, Lora, LoraShape
from pipeline.trainable.selection import select_trainable
from tests.pipeline.forward.test_logps import tiny_model


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("fraction", "first"), [(0.25, 1), (0.5, 1), (0.51, 0), (1.0, 0)])
def test_last_fraction_rounds_up_to_whole_blocks_and_freezes_the_rest(fraction, first):
    model = tiny_model()  # two blocks
    names = trained(select_trainable(model, LastFraction(last_fraction=fraction)))
    expected = {
        n for n, _ in model.named_parameters() if any(n.startswith(f"model.layers.{i}.") for i in range(first, 2))
    }
    assert names == expected and names


def test_all_trains_everything_and_head_only_the_output_weights():
    model = tiny_model()
    assert trained(select_trainable(model, "all")) == {name for name, _ in model.named_parameters()}
    assert trained(select_trainable(model, "head")) == {"lm_head.weight"}
    assert all(name.startswith("model.layers.1.") for name in trained(select_trainable(model, "last_block")))


def test_lora_trains_only_its_factors_and_is_the_same_for_the_same_seed():
    def factors(seed: int):
        shape = LoraShape(r=2, alpha=4, targets=["q_proj"], blocks="last", seed=seed)
        model = select_trainable(tiny_model(), Lora(lora=shape))
        assert all("lora_" in name and ".layers.1." in name for name in trained(model))
        return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}

    first, again, other = factors(0), factors(0), factors(1)
    assert all((first[name] == again[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)


def test_unknown_lora_targets_are_named():
    with pytest.raises(RequestError, match="nonexistent"):
        select_trainable(tiny_model(), Lora(lora=LoraShape(targets=["nonexistent"])))
