"""The proposer in the real vLLM engine, on a tiny Llama or Gemma and a drafter trained on its texts; needs vLLM.

What the engine writes is compared with transformers' greedy text, what it accepts with the drafter's chains along
that text. Both models are float32: one step of an engine is some milliseconds, starting one some seconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from recurrent_drafting import BeamConfig, Drafter, RecurrentDraftingConfig, Verifier, beam_search, engines
from recurrent_drafting.engines import Request
from recurrent_drafting.lossless import Pair

pytest.importorskip("vllm", reason="vLLM is not installed")
import vllm

from recurrent_drafting import vllm_proposer
from vllm_server import PROPOSER

VOCAB, HIDDEN, LENGTH, MAX_MODEL_LEN, BLOCK = 32, 64, 3, 160, 32
EOS = 2
pytestmark = pytest.mark.slow


class Tiny:
    """A base, a drafter that predicts some of its text, and what is to be expected of them."""

    def __init__(self, folder: Path, family: str = "llama") -> None:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            family,
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.3,
            tie_word_embeddings=False,
        )
        self.model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            # The last token decides most of what follows, which a drafter can learn in seconds.
            share = 0.12 if family == "gemma" else 0.03  # Gemma multiplies its embeddings
            for layer in self.model.model.layers:
                layer.self_attn.o_proj.weight.mul_(share)
                layer.mlp.down_proj.weight.mul_(share)
        self.base, self.speculator = str(folder / "base"), str(folder / "drafter")
        self.model.save_pretrained(self.base)
        self.save_tokenizer()
        self.drafter = self.trained_drafter()
        self.drafter.save_pretrained(self.speculator)

    def save_tokenizer(self) -> None:
        """Make the tokens the words t0, t1, ..., so that a text says which they are."""
        words = Tokenizer(models.WordLevel({f"t{token}": token for token in range(VOCAB)}, unk_token="t0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.decoder = decoders.Fuse()
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2", bos_token="t1").save_pretrained(self.base)

    def trained_drafter(self) -> Drafter:
        texts = self.continue_all(torch.tensor(prompts(128, seed=9)), 48)
        states, steps = self.states(texts), texts.shape[1] - LENGTH - 1
        contexts = states[:, :steps].reshape(-1, HIDDEN)
        windows = texts[:, 1:].unfold(1, LENGTH + 1, 1)[:, :steps].reshape(-1, LENGTH + 1)
        embeddings = self.embed(windows[:, :LENGTH]).detach()
        drafter = Drafter(RecurrentDraftingConfig(hidden_size=HIDDEN, vocab_size=VOCAB, num_draft_layers=1))
        optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
        for _ in range(150):
            rows = torch.randint(len(contexts), (512,))
            logits = drafter.head(drafter.unroll(contexts[rows], embeddings[rows]))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), windows[rows, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return drafter.eval()

    def embed(self, tokens: Tensor) -> Tensor:
        """Return rows of the embeddings, without the factor that Gemma applies to them."""
        return nn.functional.embedding(tokens, self.model.get_input_embeddings().weight)

    @torch.no_grad()
    def states(self, texts: Tensor) -> Tensor:
        found: Tensor = self.model.model(texts).last_hidden_state
        return found

    @torch.no_grad()
    def continue_all(self, texts: Tensor, new_tokens: int) -> Tensor:
        """Append greedy tokens to ``[B, T]``; end of sequence is a token like others."""
        output = self.model(texts, use_cache=True)
        for _ in range(new_tokens):
            following = output.logits[:, -1:].argmax(-1)
            texts = torch.cat([texts, following], dim=1)
            output = self.model(following, past_key_values=output.past_key_values)
        return texts

    def text(self, prompt: list[int], new_tokens: int) -> list[int]:
        return list(self.continue_all(torch.tensor([prompt]), new_tokens)[0, len(prompt) :].tolist())

    @torch.no_grad()
    def accepted(self, prompt: list[int], new_tokens: int) -> tuple[int, int]:
        """Return (chains verified, draft tokens accepted) of greedy decoding, by the definition."""
        # The last step may go beyond what was asked for; its drafts count.
        text = self.text(prompt, new_tokens + LENGTH)
        states = self.states(torch.tensor([prompt + text]))[0]
        steps, accepted, written = 0, 0, 1
        while written < new_tokens:
            context, root = states[len(prompt) + written - 2], torch.tensor([text[written - 1]])
            beams = beam_search.draft(self.drafter, context[None], root, self.embed, BeamConfig(1, LENGTH))
            chain, truth = beams.tokens[0, :, 0].tolist(), text[written : written + LENGTH]
            hits = [a == b for a, b in zip(chain, truth, strict=True)]
            matched = hits.index(False) if False in hits else LENGTH
            steps, accepted, written = steps + 1, accepted + matched, written + matched + 1
        return steps, accepted


def prompts(count: int, *, seed: int, length: int | None = None) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length or 4,), generator=generator).tolist() for _ in range(count)]


class Engine:
    """An engine in this process, and counters since the last look."""

    def __init__(self, tiny: Tiny, **options: Any) -> None:
        self.llm = vllm.LLM(
            tiny.base,
            dtype="float32",
            max_model_len=MAX_MODEL_LEN,
            block_size=BLOCK,
            enforce_eager=True,
            skip_tokenizer_init=True,
            disable_log_stats=False,
            speculative_config={"model": PROPOSER, "num_speculative_tokens": LENGTH},
            additional_config={"speculator_path": tiny.speculator},
            **options,
        )
        self._seen = self._counters()

    def write(self, prompts: list[list[int]], lengths: list[int], **sampling: Any) -> list[Any]:
        requests: list[Any] = [{"prompt_token_ids": ids} for ids in prompts]
        outputs: list[Any] = self.llm.generate(requests, parameters(lengths, **sampling), use_tqdm=False)
        return outputs

    def counted(self) -> dict[str, int]:
        """Return what the engine's own counters say happened since the last call."""
        now = self._counters()
        seen, self._seen = self._seen, now
        return {name: value - seen.get(name, 0) for name, value in now.items()}

    def _counters(self) -> dict[str, int]:
        metrics = self.llm.get_metrics()
        return {metric.name.removeprefix("vllm:"): metric.value for metric in metrics if hasattr(metric, "value")}


def parameters(lengths: list[int], **sampling: Any) -> list[Any]:
    settings = {"temperature": 0.0, "ignore_eos": True, "detokenize": False, **sampling}
    return [vllm.SamplingParams(max_tokens=length, **settings) for length in lengths]


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@contextmanager
def in_this_process() -> Iterator[None]:
    """Keep an engine in this process, and put back what its proposer wraps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"))
        for kind in (vllm_proposer.Sampler, vllm_proposer.RejectionSampler):
            patch.setattr(kind, "forward", kind.forward)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def roomy(tiny: Tiny) -> Iterator[Engine]:
    """An engine in which no request waits; its counters end when another engine starts."""
    with in_this_process():
        yield Engine(tiny, max_num_seqs=8, num_gpu_blocks_override=200)


@pytest.fixture(scope="module")
def crowded(tiny: Tiny) -> Iterator[Engine]:
    """An engine with a token budget of two chains and a bit, and too few blocks for its four requests."""
    with in_this_process():
        yield Engine(
            tiny, max_num_seqs=4, max_num_batched_tokens=10, enable_chunked_prefill=True, num_gpu_blocks_override=6
        )


def check_text_and_chains(tiny: Tiny, engine: Engine, *, together: bool) -> None:
    """Compare what an engine writes with the base's text, and what it accepts with the drafter's chains."""
    asked, lengths = prompts(8, seed=1), [40, 33, 21, 1, 2, 37, 40, 11]
    engine.counted()
    if together:
        written = tokens(engine.write(asked, lengths))
    else:
        written = [tokens(engine.write([ids], [n]))[0] for ids, n in zip(asked, lengths, strict=True)]
    assert written == [tiny.text(ids, n) for ids, n in zip(asked, lengths, strict=True)]
    steps, accepted = (sum(part) for part in zip(*map(tiny.accepted, asked, lengths), strict=True))
    counted = engine.counted()
    assert counted["spec_decode_num_drafts"] == steps
    assert counted["spec_decode_num_draft_tokens"] == LENGTH * steps
    assert counted["spec_decode_num_accepted_tokens"] == accepted
    assert 0.3 < accepted / steps < LENGTH - 0.3, "neither none nor all"


@pytest.mark.parametrize("together", [False, True])
def test_it_writes_the_bases_text_and_accepts_what_the_chains_say(tiny: Tiny, roomy: Engine, together: bool) -> None:
    check_text_and_chains(tiny, roomy, together=together)


def test_a_cached_prefix(tiny: Tiny, roomy: Engine) -> None:
    # Of the longer ones a single token is left to read, which vLLM schedules with drafts that do not exist.
    shared = prompts(1, seed=5, length=2 * BLOCK)[0]
    asked = [shared, [*shared, 7], [*shared, 9], [*shared, 7], [*shared[:BLOCK], 11], [3]]
    lengths = [30] * len(asked)
    expected = [tiny.text(ids, 30) for ids in asked]
    roomy.counted()
    assert tokens(roomy.write(asked, lengths)) == expected
    assert tokens(roomy.write(asked, lengths)) == expected
    counted = roomy.counted()
    assert counted["prefix_cache_hits"] >= 4 * BLOCK
    assert counted["spec_decode_num_accepted_tokens"] > 0.3 * counted["spec_decode_num_drafts"]


def test_requests_join_leave_and_are_cancelled(tiny: Tiny, roomy: Engine) -> None:
    engine = roomy.llm.llm_engine
    asked = dict(enumerate(prompts(12, seed=6, length=9)))
    lengths = {name: 10 + 4 * name for name in asked}
    finished: dict[str, list[int]] = {}
    waiting, steps = list(asked), 0
    while waiting or engine.has_unfinished_requests():
        if waiting and steps % 2 == 0:
            name = waiting.pop(0)
            [sampling] = parameters([lengths[name]])
            engine.add_request(str(name), {"prompt_token_ids": asked[name]}, sampling)
        if steps == 9:
            engine.abort_request(["3"])
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
    del asked[3]
    finished.pop("3", None)
    assert finished == {str(name): tiny.text(ids, lengths[name]) for name, ids in asked.items()}


def test_a_text_ends_at_the_models_length(tiny: Tiny, roomy: Engine) -> None:
    asked = prompts(2, seed=7, length=MAX_MODEL_LEN - 30)
    short = prompts(1, seed=8)[0]
    written = tokens(roomy.write([*asked, short], [100, 100, 60]))
    assert written == [*(tiny.text(ids, 30) for ids in asked), tiny.text(short, 60)]


def test_sampled_text_follows_the_seed(roomy: Engine) -> None:
    asked = prompts(4, seed=10)
    first, again, other = (tokens(roomy.write(asked, [30] * 4, temperature=1.0, seed=seed)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_sampled_text_has_the_bases_distribution(tiny: Tiny, roomy: Engine) -> None:
    [prompt], count, temperature = prompts(1, seed=11), 800, 0.7
    written = torch.tensor(tokens(roomy.write([prompt] * count, [3] * count, temperature=temperature)))
    with torch.no_grad():
        first = (tiny.model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
        rows = torch.tensor([[*prompt, token] for token in range(VOCAB)])
        expected = first[:, None] * (tiny.model(rows).logits[:, -1] / temperature).softmax(-1)
    pairs = torch.bincount(written[:, 0] * VOCAB + written[:, 1], minlength=VOCAB**2).view(VOCAB, VOCAB) / count
    drawn = torch.multinomial(expected.flatten(), count, replacement=True).bincount(minlength=VOCAB**2) / count
    distance, noise = ((found - expected.flatten()).abs().sum() / 2 for found in (pairs.flatten(), drawn))
    # The second token is the first that was verified.
    assert distance < noise + 0.08


def test_chunked_prefill_trimmed_drafts_and_preemption(tiny: Tiny, crowded: Engine) -> None:
    asked = [*prompts(5, seed=2, length=40), *prompts(5, seed=3, length=7)]
    lengths = [50, 45, 40, 35, 30, 60, 50, 40, 30, 20]
    crowded.counted()
    written = tokens(crowded.write(asked, lengths))
    assert written == [tiny.text(ids, n) for ids, n in zip(asked, lengths, strict=True)]
    counted = crowded.counted()
    assert counted["num_preemptions"] > 0
    assert 0 < counted["spec_decode_num_draft_tokens"] < LENGTH * counted["spec_decode_num_drafts"], "some were trimmed"
    assert counted["spec_decode_num_accepted_tokens"] > 0.3 * counted["spec_decode_num_drafts"]


def test_prompt_log_probabilities_beside_decoding(tiny: Tiny, crowded: Engine) -> None:
    asked, lengths = prompts(4, seed=4, length=23), [30, 12, 25, 18]
    outputs = crowded.write(asked, lengths, prompt_logprobs=0)
    assert tokens(outputs) == [tiny.text(ids, n) for ids, n in zip(asked, lengths, strict=True)]
    for ids, output in zip(asked, outputs, strict=True):
        with torch.no_grad():
            expected = tiny.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
        own = expected[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(found), own, atol=1e-3, rtol=1e-3)


def test_the_data_engine_writes_what_transformers_write(tiny: Tiny) -> None:
    greedy = [Request(ids, seed, 0.0) for seed, ids in enumerate(prompts(12, seed=13, length=9))]
    sampled = [Request(ids, 100 + seed, 1.0, 0.03) for seed, ids in enumerate(prompts(4, seed=14))]
    with in_this_process():
        engine = engines.VllmEngine(tiny.base, MAX_MODEL_LEN)
        rows, again = (engine.generate([*greedy, *sampled], 40) for _ in range(2))
    assert rows == again
    verifier = Verifier(LlamaForCausalLM.from_pretrained(tiny.base).eval(), name_or_path=tiny.base)
    expected = engines.TransformersEngine(verifier).generate(greedy, 40)
    for request, row, other in zip(greedy, rows, expected, strict=False):
        split = Pair(request.prompt, request.seed, row, other).divergence
        if split == min(len(row), len(other)):
            assert len(row) == len(other)
            continue
        # This engine is bfloat16, so it may part from float32 where two tokens are about as likely.
        with torch.no_grad():
            scores = tiny.model(torch.tensor([request.prompt + row[:split]])).logits[0, -1]
        assert float(scores[other[split]] - scores[row[split]]) < 0.03 * float(scores.max() - scores.min())
    assert sum(row == other for row, other in zip(rows, expected, strict=False)) >= len(greedy) / 2
    assert all(all(token != EOS for token in row[:-1]) and 1 <= len(row) <= 40 for row in rows)


def test_a_base_that_multiplies_its_embeddings(tmp_path: Path) -> None:
    # The last test: the engines that others share do not outlive the end of this one.
    tiny = Tiny(tmp_path, "gemma")
    with in_this_process():
        check_text_and_chains(tiny, Engine(tiny, max_num_seqs=8, num_gpu_blocks_override=200), together=True)
