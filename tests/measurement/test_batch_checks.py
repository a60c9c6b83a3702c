"""Which masks hide tokens, and which order the stream has: without running a model."""

import pytest
import torch

from simlab import ConfigError
from simlab.measurement.batch_checks import Stream, refuse_padding, token_ids

B, T = 2, 5
CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()
SEEN = CAUSAL.expand(B, 1, T, T).clone()  # by query and key, true where a query looks
PADDED = SEEN.clone()
PADDED[0, :, :, :2] = False  # two keys on the left, which no query sees
PACKED = SEEN.clone()
PACKED[:, :, 3:, :3] = False  # two sequences in one: the second doesn't see the first
ONES = torch.ones(B, T, dtype=torch.long)
LEFT = ONES.clone()
LEFT[0, :2] = 0


LOWEST = torch.finfo(torch.float32).min


def added(seen, low=LOWEST):
    """As it is added to the logits."""
    return torch.zeros(seen.shape).masked_fill(~seen, low)


ACCEPTED = {
    "ones": {"attention_mask": ONES},
    "by query and key": {"attention_mask": SEEN},
    "where a query doesn't look": {"attention_mask": ~SEEN},
    "by query and key, for all heads": {"attn_mask": SEEN[:, 0]},
    "by query and key, in numbers": {"attention_mask": SEEN.long()},
    "of two heads": {"attention_mask": torch.cat([SEEN, PADDED], 1)},
    "all of every token": {"attention_mask": torch.ones_like(SEEN)},
    "added to the logits": {"attention_mask": added(SEEN)},
    "nothing is added": {"attention_mask": torch.zeros(B, 1, T, T)},
    "nowhere a query doesn't look": {"attention_mask": torch.zeros_like(SEEN)},
    "added in float16": {"attention_mask": added(SEEN, -65504.0).half()},
    "a bias by distance": {"attention_mask": added(SEEN) - 60.0 * torch.arange(T).flip(0)},
    "of a sequence and its own length": {"mask": CAUSAL},
    "the other way round": {"mask": ~CAUSAL},
    "packed sequences": {"attention_mask": PACKED, "position_ids": torch.tensor([[0, 1, 2, 0, 1]])},
    "by layer type": {"attention_mask": {"full_attention": added(SEEN), "sliding_attention": None}},
    "key padding, none": {"key_padding_mask": torch.zeros(B, T, dtype=torch.bool)},
    "of the loss": {"loss_mask": LEFT},
    "of heads": {"head_mask": torch.zeros(B, T)},
    "of the encoder": {"encoder_attention_mask": LEFT},
    "of cross-attention": {"cross_attn_mask": LEFT},
}
REFUSED = {
    "by token": {"attention_mask": LEFT},
    "by token, boolean": {"attention_mask": LEFT.bool()},
    "by query and key": {"attention_mask": PADDED},
    "by query and key, for all heads": {"attn_mask": PADDED[:, 0]},
    "by query and key, in numbers": {"attention_mask": PADDED.long()},
    "by query and key, in floats": {"attention_mask": PADDED.float()},
    "where a query doesn't look": {"attention_mask": ~PADDED},
    "the same in each sequence": {"attention_mask": ~PADDED[:1]},
    "added to the logits": {"attention_mask": added(PADDED)},
    "added, of minus infinity": {"attention_mask": added(PADDED, -torch.inf)},
    "added, of float16": {"attention_mask": added(PADDED, -65504.0).half()},
    "by layer type": {"attention_mask": {"full_attention": None, "sliding_attention": PADDED}},
    "key padding": {"key_padding_mask": LEFT == 0},
    "another name": {"src_mask": LEFT},
}


@pytest.mark.parametrize("how", ACCEPTED)
def test_masks_that_hide_no_token(how):
    refuse_padding(ACCEPTED[how])


@pytest.mark.parametrize("how", REFUSED)
def test_masks_that_hide_tokens(how):
    with pytest.raises(ConfigError, match=r"mask hides 2 of (5|10) tokens"):
        refuse_padding(REFUSED[how])


def test_streams_that_are_no_stream_of_the_ids():
    ids = torch.arange(B * T).view(B, T)
    Stream({"input_ids": ids}, longer=False).begin(torch.zeros(B, T, 3))
    Stream({"input_ids": ids}, longer=True).begin(torch.zeros(B, T + 1, 3))
    vectors = {"inputs_embeds": torch.zeros(B, T, 3)}
    Stream(vectors, longer=False).begin(torch.zeros(B, T, 3))
    with pytest.raises(ConfigError, match="must be \\(batch, length, width\\), a token for each"):
        Stream(vectors, longer=False).begin(torch.zeros(T, B, 3))
    for shape, longer in (((T, B, 3), False), ((T, B, 3), True), ((B, T + 1, 3), False)):
        with pytest.raises(
            ConfigError, match="must be \\(batch, length, width\\), a token for each"
        ):
            Stream({"input_ids": ids}, longer).begin(torch.zeros(shape))


def test_token_ids_are_told_from_what_goes_with_them():
    """In any order: a training script's mapping may begin with the mask."""
    ids = torch.arange(B * T).view(B, T)
    beside = {
        "attention_mask": ONES,
        "position_ids": ids,
        "token_type_ids": ONES,
        "labels": ONES,
        "seen": ONES.bool(),
        "weights": torch.ones(B, T),
    }
    assert token_ids(beside) is None
    for name in ("input_ids", "idx"):
        assert token_ids(beside | {name: ids}) is ids
    assert token_ids({"draft": ONES, "input_ids": ids}) is ids


def test_rows_that_an_embedding_lacks():
    class Counted(torch.nn.Embedding):
        """With rows of its own for positions, as of OPT: what it gets isn't looked up."""

        def forward(self, ids):
            return super().forward(ids % 5)

    table, own = torch.nn.Embedding(10, 3), Counted(5, 3)
    model = torch.nn.ModuleDict({"wte": table, "wpe": own})
    ids = torch.arange(B * T).view(B, T)
    with Stream({"input_ids": ids}, longer=False).watch(model):
        table(ids)
        own(ids)
        for wrong, row in ((ids + 1, 10), (ids - 1, -1)):
            with pytest.raises(ConfigError, match=f"wte has 10 rows, and row {row} is asked for"):
                table(wrong)
    with pytest.raises(IndexError):
        table(ids + 1)
