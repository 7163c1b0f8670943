"""
Symbol learning: what is asked of the model and what it reads.

    pytest tests/test_sft.py
"""
import math

import torch

import sft
from lm import Llama, LlamaConfig


def model(seed=0) -> Llama:
    torch.manual_seed(seed)
    llama = Llama(LlamaConfig(1 + 12, 32, 48, 2, 4, 2, 8, n_visual=12))
    for p in llama.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.3)
    return llama.requires_grad_(False)


def clips(B=3, F=4, K=2, seed=0):
    return torch.randint(12, (B, F, K), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_sequence():
    codes = clips()
    ids = sft.sequence(model(), codes)
    assert ids.shape == (3, 9) and ids.dtype == torch.int64
    assert (ids[:, 0] == 0).all() and torch.equal(ids[:, 1:] - 1, codes.flatten(1).long())


def test_loss_is_the_cross_entropy_of_the_next_code():
    llama, codes = model(), clips()
    ids = sft.sequence(llama, codes)
    loss = sft.NextToken(llama)(ids, ids)
    for i, clip in enumerate(codes.flatten(1).tolist()):
        total = 0.0
        for j, code in enumerate(clip):                          # one prefix after the other, over visual codes alone
            logits = llama.logits(llama(ids[i:i + 1, :j + 1]))[0, -1, 1:].double()
            total -= math.log(logits.softmax(-1)[code])
        assert abs(loss[i].item() - total / len(clip)) < 1e-5


def test_what_is_read_may_be_wrong_what_is_asked_is_true():
    llama = model()
    ids, others = sft.sequence(llama, clips()), sft.sequence(llama, clips(seed=1))
    read = torch.cat([ids[:, :5], others[:, 5:]], 1)
    loss = sft.NextToken(llama)(ids, read)
    logits = llama.visual_logits(llama(read[:, :-1])).log_softmax(-1)                # (B, S - 1, V)
    expected = -logits.gather(-1, ids[:, 1:, None] - 1).mean((1, 2))
    torch.testing.assert_close(loss, expected)
    assert not torch.allclose(loss, sft.NextToken(llama)(ids, ids))
