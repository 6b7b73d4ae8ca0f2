from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.splitting import is_selected, share_of, side_of

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SEED = st.integers(0, 2**32)
SHARE = st.floats(0, 1, exclude_max=True)


@settings(deadline=None)  # machines under load
@given(TEXT, SEED, SHARE, SHARE)
def test_a_larger_test_share_only_moves_prompts_to_test(text, seed, one, other):
    low, high = sorted([one, other])
    if side_of(text, seed=seed, test_share=low) == "test":
        assert side_of(text, seed=seed, test_share=high) == "test"
    assert side_of(text, seed=seed, test_share=0) == "train"


@settings(deadline=None)  # machines under load
@given(TEXT, SHARE, SHARE)
def test_a_larger_share_of_sft_prompts_keeps_those_selected_before(text, one, other):
    low, high = sorted([one, other])
    assert is_selected(text, share=high) or not is_selected(text, share=low)
    assert is_selected(text, share=1.0)


def test_sides_never_change_between_releases():
    test = [n for n in range(32) if side_of(f"prompt {n}", seed=0, test_share=0.3) == "test"]
    assert test == [5, 6, 14, 15, 18, 27, 30]
    assert round(share_of("prompt", seed=1, purpose="split"), 9) == 0.620227963


def test_shares_are_uniform_and_independent_between_seeds_and_purposes():
    texts = [f"prompt {n}" for n in range(4000)]
    test = [side_of(text, seed=0, test_share=0.25) == "test" for text in texts]
    other = [side_of(text, seed=1, test_share=0.25) == "test" for text in texts]
    chosen = [is_selected(text, share=0.5) for text in texts]
    # four standard errors of a binomial share
    assert abs(sum(test) / 4000 - 0.25) < 0.028
    assert abs(sum(a and b for a, b in zip(test, other, strict=True)) / 4000 - 0.0625) < 0.016
    assert abs(sum(a and b for a, b in zip(test, chosen, strict=True)) / 4000 - 0.125) < 0.021
