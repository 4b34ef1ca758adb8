"""Train an assistant for the built-in model, on a CPU, stopping by the clock; or write a trained one as a GGUF.

    python training/assistant.py train MODEL.gguf OUT.pt [--minutes 25]
    python training/assistant.py export OUT.pt MODEL.gguf mtp-gemma4-demo.gguf

In: the GGUF of the built-in model, and nothing else: the text is rule-made tales and the model's own replies. The
assistant learns the model's distribution of the next STEPS tokens, each step fed with its own hidden state of the one
before, from the model's keys and values as they are when the first of these tokens is drafted. Forward pass as in
mlx_gemma4/model/assistant.py. Out: its weights, and as a GGUF of architecture `gemma4-assistant` (Q5_0, head Q4_1).
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from dialogue import SMALL_TALK, STORY_REQUESTS, STYLE_REQUESTS, SYSTEMS, TALE_REQUESTS, turn
from evaluate import OPENINGS, load
from export import add_tokenizer
from model import Gemma4, Shape, rms, rope_freqs, rope_table, rotate
from tales import tale
from tokenizers import Tokenizer
from torch import Tensor, nn
from train import Muon
from vocabulary import BOS, Vocabulary, build

HIDDEN, FFN, PATTERN, HEADS = 128, 192, "SSSG", 4
STEPS, WEIGHTS = 3, (1.0, 0.7, 0.5)  # drafted tokens, and how much each counts
LENGTH, BATCH = 256, 4


class Assistant(nn.Module):
    """Weights under their GGUF names, dots as slashes."""

    def __init__(self, target: Gemma4) -> None:
        super().__init__()
        s = target.shape
        self.shape, self.target_hidden = s, s.hidden
        e = target.get("token_embd").detach()
        _, _, v = torch.linalg.svd(e.T @ e)
        basis = v[:HIDDEN]  # of the directions in which tokens differ most: drafts begin as the model's hidden state
        made = {
            "token_embd": e @ basis.T,
            "nextn/pre_projection": torch.cat([basis, basis / 2], dim=1),  # about equally long
            "nextn/post_projection": basis.T.clone(),
            "output_norm": torch.full((HIDDEN,), 3.0),
        }
        late = (2 * len(PATTERN)) ** -0.5
        for i, kind in enumerate(PATTERN):
            d = s.head_dim if kind == "S" else s.head_dim_global
            shapes = {"attn_q": (HEADS * d, HIDDEN), "attn_output": (HIDDEN, HEADS * d), "ffn_gate": (FFN, HIDDEN),
                      "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN)}  # fmt: skip
            made |= {f"blk/{i}/{name}": torch.randn(n, k) * k**-0.5 for name, (n, k) in shapes.items()}
            made |= {f"blk/{i}/{name}": torch.ones(HIDDEN) for name in ("attn_norm", "ffn_norm")}
            made |= {
                f"blk/{i}/{name}": torch.full((HIDDEN,), late) for name in ("post_attention_norm", "post_ffw_norm")
            }
            made |= {f"blk/{i}/attn_q_norm": torch.full((d,), d**-0.25), f"blk/{i}/layer_output_scale": torch.ones(1)}
        self.w = nn.ParameterDict(made)
        for kind, sliding in (("S", True), ("G", False)):
            self.register_buffer(f"rope_{kind}", rope_table(s, sliding, s.context), persistent=False)

    def forward(
        self, x: Tensor, positions: Tensor, kv: dict[str, tuple[Tensor, Tensor]], masks: dict[str, Tensor]
    ) -> Tensor:
        """Inputs (B, T, 2 H), of queries at `positions`, and the model's keys and values: (B, T, HIDDEN), normed."""
        z, eps = F.linear(x, self.w["nextn/pre_projection"]), self.shape.eps
        for i, kind in enumerate(PATTERN):
            w = lambda name: self.w[f"blk/{i}/{name}"]  # noqa: E731, B023
            b, t, _ = z.shape
            q = F.linear(rms(z, w("attn_norm"), eps), w("attn_q")).view(b, t, HEADS, -1).transpose(1, 2)
            q = rotate(rms(q, w("attn_q_norm"), eps), getattr(self, f"rope_{kind}")[:, positions])
            k, v = (a.expand(b, HEADS, *a.shape[2:]) for a in kv[kind])
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=masks[kind], scale=1.0)
            a = F.linear(a.transpose(1, 2).reshape(b, t, -1), w("attn_output"))
            z = z + rms(a, w("post_attention_norm"), eps)
            u = rms(z, w("ffn_norm"), eps)
            u = F.linear(
                F.gelu(F.linear(u, w("ffn_gate")), approximate="tanh") * F.linear(u, w("ffn_up")), w("ffn_down")
            )
            z = (z + rms(u, w("post_ffw_norm"), eps)) * w("layer_output_scale")
        return rms(z, self.w["output_norm"], eps)


def run(assistant: Assistant, target: Gemma4, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Of each step the assistant's logits and the model's (B, T - STEPS, V), for drafts after each token."""
    s = target.shape
    own: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        hidden = target.hidden(tokens, own)
        embedded = F.embedding(tokens, target.get("token_embd")) * math.sqrt(s.hidden)
        truth = s.softcap * torch.tanh(F.linear(hidden, target.get("token_embd")) / s.softcap)
    n = tokens.shape[1] - STEPS
    source = {"S": s.layers - s.shared - 2, "G": s.layers - s.shared - 1}
    kv = {kind: tuple(a[:, :, :n] for a in own[layer]) for kind, layer in source.items()}
    back = torch.arange(n)[:, None] - torch.arange(n)  # the query of row i is at position i + 1
    masks = {"S": (back >= 0) & (back + 1 < s.window), "G": back >= 0}
    drafted, wanted, carried = [], [], hidden[:, :n]
    for step in range(STEPS):
        x = torch.cat([embedded[:, 1 + step : 1 + step + n], carried], dim=-1)
        h = assistant(x, torch.arange(1, n + 1), kv, masks)
        carried = F.linear(h, assistant.w["nextn/post_projection"])
        drafted.append(F.linear(h, assistant.w["token_embd"]))
        wanted.append(truth[:, 1 + step : 1 + step + n])
    return drafted, wanted


# ---- text -----------------------------------------------------------------------------------------------------------


def requests(rng: random.Random, tokenizer: Tokenizer) -> list[int]:
    """A prompt as people give it, in the model's turn format, or the beginning of plain prose."""
    draw, (text, noun) = rng.random(), tale(rng)
    first = " ".join(text.split(" ")[: rng.randint(2, 9)])
    if draw < 0.25:
        plain = rng.choice([rng.choice(OPENINGS), first])
        return [BOS, *tokenizer.encode(plain, add_special_tokens=False).ids]
    asked = [rng.choice(STORY_REQUESTS).format(n=noun), rng.choice(TALE_REQUESTS), first, "Once upon a time"]
    asked += [rng.choice(rng.choice(list(STYLE_REQUESTS.values()))), rng.choice(rng.choice(SMALL_TALK)[0])]
    system = turn("system", rng.choice(SYSTEMS)) if rng.random() < 0.1 else ""
    prompt = system + turn("user", rng.choice(asked)) + "<|turn>model\n"
    return [BOS, *tokenizer.encode(prompt, add_special_tokens=False).ids]


@torch.no_grad()
def replies(target: Gemma4, prompts: list[list[int]], length: int, temperature: float, seed: int) -> Tensor:
    """Prompts, cut to the shortest, and what the model says to them (top-k 40, top-p 0.95): (B, length)."""
    chance, steps = torch.Generator().manual_seed(seed), Stepper(target)
    ids = torch.tensor([p[: min(map(len, prompts))] for p in prompts])
    for i in range(length - 1):
        hidden = steps(ids[:, i], i)
        if i + 1 < ids.shape[1]:
            continue
        logits = target.shape.softcap * torch.tanh(F.linear(hidden, target.get("token_embd")) / target.shape.softcap)
        values, tokens = (logits / temperature).topk(40)
        shares = values.softmax(-1)
        shares[shares.cumsum(-1) - shares > 0.95] = 0
        ids = torch.cat([ids, tokens.gather(1, torch.multinomial(shares, 1, generator=chance))], dim=1)
    return ids


class Stepper:
    """The model a token at a time, for a batch, within its window."""

    def __init__(self, target: Gemma4) -> None:
        self.m = target
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, token: Tensor, at: int) -> Tensor:
        m, s = self.m, self.m.shape
        x = F.embedding(token, m.get("token_embd")) * math.sqrt(s.hidden)
        ple = F.linear(x, m.get("per_layer_model_proj")).view(-1, s.layers, s.ple) * s.hidden**-0.5
        own = F.embedding(token, m.get("per_layer_token_embd")).view(-1, s.layers, s.ple) * math.sqrt(s.ple)
        ple = (rms(ple, m.get("per_layer_proj_norm"), s.eps) + own) / math.sqrt(2)
        for i in range(s.layers):
            w = lambda name: m.get(f"blk.{i}.{name}")  # noqa: E731, B023
            norm = lambda y, name: rms(y, w(name), s.eps)  # noqa: E731, B023
            h, d = norm(x, "attn_norm"), s.dim(i)
            table = (m.rope_sliding if s.is_sliding(i) else m.rope_global)[:, at : at + 1]
            heads = lambda y: y.view(len(token), -1, 1, d)  # noqa: E731, B023
            q = rotate(norm(heads(F.linear(h, w("attn_q"))), "attn_q_norm"), table)
            if s.owns_kv(i):
                k = rotate(norm(heads(F.linear(h, w("attn_k"))), "attn_k_norm"), table)
                v = rms(heads(F.linear(h, w("attn_v"))), None, s.eps)
                before = self.kv.get(i)
                self.kv[i] = (
                    (k, v) if before is None else tuple(torch.cat(p, 2) for p in zip(before, (k, v), strict=True))
                )
            k, v = self.kv[s.kv_source(i)]
            if s.is_sliding(i):
                k, v = k[:, :, -s.window :], v[:, :, -s.window :]
            a = (q @ k.mT).softmax(-1) @ v
            x = x + norm(F.linear(a.reshape(len(token), -1), w("attn_output")), "post_attention_norm")
            y = norm(x, "ffn_norm")
            y = F.linear(
                F.gelu(F.linear(y, w("ffn_gate")), approximate="tanh") * F.linear(y, w("ffn_up")), w("ffn_down")
            )
            x = x + norm(y, "post_ffw_norm")
            y = F.linear(F.gelu(F.linear(x, w("inp_gate")), approximate="tanh") * ple[:, i], w("proj"))
            x = (x + norm(y, "post_norm")) * w("layer_output_scale")
        return rms(x, m.get("output_norm"), s.eps)


def tale_row(rng: random.Random, tokenizer: Tokenizer, length: int) -> list[int]:
    """Conversations of rule-made tales, as training/dialogue.py makes them, cut to a length."""
    ids: list[int] = [BOS]
    while len(ids) < length + 1:
        text, noun = tale(rng)
        first = " ".join(text.split(" ")[: rng.randint(2, 9)])
        asked = rng.choice([first, rng.choice(TALE_REQUESTS), rng.choice(STORY_REQUESTS).format(n=noun)])
        both = turn("user", asked) + turn("model", text)
        ids += tokenizer.encode(both, add_special_tokens=False).ids
    return ids[:length]


def vocabulary_of(path: Path) -> Vocabulary:
    fields = gguf.GGUFReader(path).fields
    read = [fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges")]
    return Vocabulary(*(list(values) for values in read))


# ---- training -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def agreement(assistant: Assistant, target: Gemma4, rows: Tensor, from_: int) -> str:
    """How often each step's likeliest token is the model's, from a position on, and how long drafts of STEPS hold."""
    right = []
    for row in rows.split(8):
        drafted, wanted = run(assistant, target, row)
        right.append(
            torch.stack([a.argmax(-1) == b.argmax(-1) for a, b in zip(drafted, wanted, strict=True)])[:, :, from_:]
        )
    all_right = torch.cat(right, dim=1).float()
    held = all_right.cumprod(0).mean((1, 2))
    shares = " ".join(f"{x:.3f}" for x in all_right.mean((1, 2)).tolist())
    return f"agrees {shares}, accepted of {STEPS}: {held.sum():.2f} (first {held[0]:.3f})"


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng, start = random.Random(1), time.monotonic()
    target, tokenizer = load(str(args.model)), build(vocabulary_of(args.model))
    target.requires_grad_(False)
    rows = []
    for i in range(args.replies):
        made = [requests(rng, tokenizer) for _ in range(96)]
        rows.append(replies(target, sorted(made, key=len)[16:80], LENGTH, rng.choice([0.5, 0.7, 1.0]), i))
    told = torch.cat(rows)
    held, told = told[:24], told[24:]
    print(f"{told.numel():,} tokens of replies after {time.monotonic() - start:.0f} s", flush=True)
    assistant = Assistant(target)
    named = dict(assistant.w.items())
    matrices = [p for name, p in named.items() if p.ndim == 2 and name != "token_embd"]
    others = [p for name, p in named.items() if p.ndim == 1 or name == "token_embd"]
    optimizers = [Muon(matrices, 0.02, 0.95, 0.0), torch.optim.AdamW(others, 2e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    average = {name: p.detach().clone() for name, p in named.items()}
    begun, step, report = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - begun) / (60 * args.minutes)) < 1:
        if rng.random() < 0.4:
            batch = torch.tensor([tale_row(rng, tokenizer, LENGTH) for _ in range(BATCH)])
        else:
            batch = told[torch.randint(len(told), (BATCH,))]
        drafted, wanted = run(assistant, target, batch)
        pairs = zip(WEIGHTS, drafted, wanted, strict=True)
        loss = sum(w * F.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
                   for w, a, b in pairs)  # fmt: skip
        loss.backward()
        nn.utils.clip_grad_norm_(named.values(), 1.0)
        factor = min(1.0, (step + 1) / 20) * min(1.0, (1 - done) / 0.6)
        for optimizer, of in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, of, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
        assistant.zero_grad()
        for name, p in named.items():
            average[name].lerp_(p.detach(), 0.02)
        step += 1
        if time.monotonic() > report:
            print(
                f"{done:5.1%} step {step} loss {loss.item():.3f} {agreement(assistant, target, held[:8], 32)}",
                flush=True,
            )
            report = time.monotonic() + 60
            torch.save({"weights": average}, args.out)
    for name, p in named.items():
        p.data.copy_(average[name])
    torch.save({"weights": average}, args.out)
    print(f"{step} steps, {time.monotonic() - start:.0f} s; held-out replies: {agreement(assistant, target, held, 32)}")


# ---- export ---------------------------------------------------------------------------------------------------------


def export(args: argparse.Namespace) -> None:
    weights, s = torch.load(args.weights, weights_only=True)["weights"], Shape()
    writer, sliding = gguf.GGUFWriter(str(args.out), "gemma4-assistant"), [kind == "S" for kind in PATTERN]
    writer.add_name("Gemma4 Demo Assistant")
    writer.add_license("mit")
    writer.add_block_count(len(PATTERN))
    writer.add_context_length(s.context)
    writer.add_embedding_length(HIDDEN)
    writer.add_embedding_length_out(s.hidden)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_key_length(s.head_dim_global)
    writer.add_value_length(s.head_dim_global)
    writer.add_key_length_swa(s.head_dim)
    writer.add_value_length_swa(s.head_dim)
    writer.add_sliding_window(s.window)
    writer.add_sliding_window_pattern(sliding)
    writer.add_shared_kv_layers(len(PATTERN))
    writer.add_layer_norm_rms_eps(s.eps)
    writer.add_rope_freq_base(s.theta_global)
    writer.add_rope_freq_base_swa(s.theta)
    writer.add_rope_dimension_count(s.head_dim_global)
    writer.add_rope_dimension_count_swa(s.head_dim)
    writer.add_uint32("gemma4-assistant.nextn_predict_layers", len(PATTERN))
    add_tokenizer(writer, vocabulary_of(args.model))
    writer.add_tensor("rope_freqs.weight", rope_freqs(s).numpy())
    size = 0
    for name, tensor in weights.items():
        array = np.ascontiguousarray(tensor.float().numpy())
        name = name.replace("/", ".") + ".weight"
        if array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1 if name.startswith("token_embd") else gguf.GGMLQuantizationType.Q5_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
        size += array.size
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{args.out}: {size:,} parameters, {args.out.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    trains = commands.add_parser("train")
    trains.add_argument("model", type=Path)
    trains.add_argument("out", type=Path)
    trains.add_argument("--minutes", type=float, default=20, help="of training, after the replies are made")
    trains.add_argument("--replies", type=int, default=10, help="batches of 64 replies to make first")
    trains.set_defaults(run=train)
    exports = commands.add_parser("export")
    exports.add_argument("weights", type=Path)
    exports.add_argument("model", type=Path)
    exports.add_argument("out", type=Path)
    exports.set_defaults(run=export)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
