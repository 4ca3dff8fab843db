"""Models that nobody here wrote, with random weights, against plain torch: `make zoo`.

    python -m benchmarks.models                 what is not yet in results/models.json, then the page
    python -m benchmarks.models GPT-2 timm      rows whose names hold one of these, anew
    python -m benchmarks.models --fresh         all rows anew

Each row takes one meta-step of two tasks in float64 in eval mode, and in training mode if the model
draws no random numbers there. `tests/untouched.py` has the oracle, which calls the untouched model.
"""

import argparse
import functools
import importlib.metadata
import json
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import implicit_optim as iopt
from benchmarks.measure import RESULTS, machine, save, table
from tests import untouched

PAGE = Path(__file__).parents[1] / "docs" / "models-tried.md"
TASKS, STEPS, TIMED = 2, 10, 3
MESSAGE = 150  # characters of a message that the table shows
# A setting that a message names is followed, once.
ADVICE = {
    "running_stats=": ("running_stats", iopt.RunningStats.BATCH, "running_stats=BATCH"),
    "Batching(chunk_size=1)": (
        "batching",
        iopt.Batching(chunk_size=1),
        "batching=Batching(chunk_size=1)",
    ),
}
VERSIONS = {"smp": "segmentation_models_pytorch", "PyG": "torch_geometric", "MONAI": "monai"}


@dataclass(frozen=True)
class Row:
    """A model, its data and its loss.

    Attributes:
        build: makes the model.
        batch: `examples -> (*inputs, target)` of one task.
        loss: `(output, target) -> scalar`.
        note: how it differs from what the name says.
        adapts: parts of the names of the parameters that adapt; by default all of a small model, and
            the vectors (norms, biases) and the last matrix of a large one.
        dtype: of the model and its inputs.
        tolerance: above which an error is called wrong.
    """

    build: Callable
    batch: Callable
    loss: Callable
    note: str = ""
    adapts: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-8


# ------------------------------------------------------------------------------ data and losses


def real(*shape):
    return torch.randn(*shape, dtype=torch.get_default_dtype())


def images(size, channels=3, classes=3):
    return lambda n: (real(n, channels, size, size), torch.arange(n) % classes)


def masks(size, channels, classes=2):
    pixels = (size, size)
    return lambda n: (real(n, channels, *pixels), torch.randint(0, classes, (n, *pixels)))


def texts(classes=3, length=5, **more):
    """Words, some of them padding, as keywords; `more` makes further keywords of the words."""

    def batch(n):
        words = torch.randint(3, 20, (n, length))
        seen = (torch.arange(length) < torch.randint(2, length + 1, (n, 1))).long()
        seen[0] = 1
        y = torch.arange(n) % classes if classes else words
        inputs = {"input_ids": words, "attention_mask": seen}
        return inputs | {k: make(words, y) for k, make in more.items()}, y

    return batch


def of_logits(output, y):
    """Cross-entropy of a class for each example, word or pixel."""
    logits = output.logits if hasattr(output, "logits") else output
    dim = -1 if logits.shape[:-1] == y.shape else 1
    return F.cross_entropy(logits.movedim(dim, -1).flatten(0, -2), y.flatten())


def own_loss(output, y):
    return output.loss


# ------------------------------------------------------------------------------------- the rows


def transformers():
    import transformers as T
    from peft import LoraConfig, get_peft_model

    T.logging.set_verbosity_error()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    inner = {"intermediate_size": 32} | sizes
    text = {"vocab_size": 20, "max_position_embeddings": 16} | inner
    # A word that says "padding" would be looked for in the data.
    alone = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    gpt = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16} | alone
    causal = text | alone | {"num_key_value_heads": 1, "head_dim": 8}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1}
    t5 |= {"num_heads": 2, "vocab_size": 20, "decoder_start_token_id": 0}
    whisper = {f"{end}_{what}": n for end in ("encoder", "decoder") for what, n in HALVES.items()}
    whisper |= {"d_model": 16, "num_mel_bins": 8, "max_source_positions": 8, "vocab_size": 20}
    whisper |= {"max_target_positions": 8} | alone
    sound = {"vocab_size": 20, "num_labels": 3, "classifier_proj_size": 8} | inner
    sound |= {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 4)}
    sound |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    sound |= {"num_feat_extract_layers": 2}
    vision = {"image_size": 16, "patch_size": 8} | inner
    pair = {"text_config": text | alone | {"eos_token_id": 2}, "vision_config": vision}
    deberta = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]} | text
    # torch's grouped matrix product, which it takes otherwise, has no float64.
    mixtral = causal | {"num_local_experts": 3, "experts_implementation": "eager"}
    # Their second derivatives are rounded to float32: plain torch's own products of v and of 0.7 v
    # differ by 1e-7.
    rounding = {"note": "norms in float32", "tolerance": 1e-6}

    def row(kind, batch, settings, loss=of_logits, **how):
        model = getattr(T, kind)
        return Row(lambda: model(model.config_class(**settings)), batch, loss, **how)

    def sentences(kind, settings, **how):
        return row(f"{kind}ForSequenceClassification", texts(), settings | {"num_labels": 3}, **how)

    def language(kind, settings, **how):
        return row(kind, texts(classes=None), settings, **how)

    def spoken(n):
        return {"input_values": real(n, 400)}, torch.arange(n) % 3

    def heard(n):
        words = torch.randint(0, 20, (n, 4))
        return {"input_features": real(n, 8, 16), "decoder_input_ids": words}, words

    def seen(n):
        x, y = images(16)(n)
        return {"pixel_values": x}, y

    def paired(n):
        return texts()(n)[0] | seen(n)[0], torch.arange(n)

    def lora():
        gpt2 = T.GPT2LMHeadModel(T.GPT2Config(**gpt))
        # At the usual start, B = 0, the products of A with itself would be zero.
        how = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
        return get_peft_model(gpt2, LoraConfig(init_lora_weights=False, **how))

    labels = texts(labels=lambda words, y: y)
    targets = texts(classes=None, labels=lambda words, y: words)
    all_states = gpt | {"output_hidden_states": True}
    of_states = lambda out, y: of_logits(out, y) + sum(h.square().mean() for h in out.hidden_states)  # noqa: E731
    of_pairs = lambda out, y: F.cross_entropy(out.logits_per_image, y)  # noqa: E731
    bert = text | {"num_labels": 3}
    rows = {
        "BERT, attention mask": sentences("Bert", text),
        "BERT, labels and loss inside": row(
            "BertForSequenceClassification", labels, bert, loss=own_loss
        ),
        "ALBERT": sentences("Albert", text | {"embedding_size": 8}),
        "DeBERTa-v2": sentences("DebertaV2", deberta),
        "GPT-2": language("GPT2LMHeadModel", gpt),
        "GPT-2, output_hidden_states": language("GPT2LMHeadModel", all_states, loss=of_states),
        "T5": row("T5ForConditionalGeneration", targets, t5, loss=own_loss, **rounding),
        "Llama": language("LlamaForCausalLM", causal, **rounding),
        "Qwen2": language("Qwen2ForCausalLM", causal, **rounding),
        "Gemma 2": language("Gemma2ForCausalLM", causal, **rounding),
        "Mixtral": language("MixtralForCausalLM", mixtral, **rounding),
        "Mamba": language(
            "MambaForCausalLM", {"vocab_size": 20, "state_size": 4} | sizes, **rounding
        ),
        "ViT": row("ViTForImageClassification", seen, vision | {"num_labels": 3}),
        "CLIP": row("CLIPModel", paired, pair | {"projection_dim": 8}, loss=of_pairs),
        "Whisper": row("WhisperForConditionalGeneration", heard, whisper),
        "wav2vec2": row("Wav2Vec2ForSequenceClassification", spoken, sound),
    }
    rows = {f"transformers {name}": row for name, row in rows.items()}
    adapters = Row(lora, texts(classes=None), of_logits, adapts=("lora_",))
    return rows | {"peft LoRA on GPT-2": adapters}


HALVES = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
FOUR = (1, 1, 1, 1)
SMALL = {"img_size": 32}
VIT = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
SWIN = {"img_size": 32, "depths": (2, 2), "num_heads": (1, 2), "embed_dim": 16, "window_size": 4}
SWINS = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224")
# The smallest model of a family as it is, ...
AS_THEY_ARE = """
cs3darknet_focus_s cspnext_tiny edgenext_xx_small ese_vovnet19b_slim_dw fasternet_t0 ghostnet_050
hgnetv2_b0 lcnet_035 legacy_seresnet18 regnetx_002 repghostnet_050 starnet_s050 test_byobnet
test_convnext test_efficientnet test_mambaout test_nfnet test_resnet
""".split()
SMALL_IMAGES = "levit_128s pit_ti_224 test_coatnet test_vit test_vit_relpos visformer_tiny".split()
# ... or with fewer blocks, ...
TWO_BLOCKS = """
cait_xxs24_224 convit_tiny deit_tiny_patch16_224 tnt_s_legacy_patch16_224
vit_tiny_patch16_dinov3_qkvb vit_tiny_r_s16_p8_224 xcit_nano_12_p8_224
""".split()
TIMM = dict.fromkeys(AS_THEY_ARE, {}) | dict.fromkeys(SMALL_IMAGES, SMALL)
TIMM |= dict.fromkeys(TWO_BLOCKS, SMALL | {"depth": 2}) | dict.fromkeys(SWINS, SWIN)
# ... or narrower as well.
TIMM |= {
    "beit_base_patch16_224": VIT,
    "crossvit_tiny_240": {"img_size": 120, "depth": ((1, 1, 0),), "embed_dim": (24, 48)},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    "dpn48b": {"k_sec": FOUR},
    "hiera_tiny_224": {"img_size": 32, "embed_dim": 24, "stages": FOUR},
    "inception_next_atto": {"depths": FOUR, "dims": (8, 16, 24, 32)},
    "naflexvit_base_patch16_parfac_gap": {"depth": 2, "embed_dim": 48, "num_heads": 3},
    "pvt_v2_b0": {"depths": FOUR, "embed_dims": (8, 16, 20, 32), "num_heads": (1, 1, 1, 2)},
    "rdnet_tiny": {"num_blocks_list": (1,) * 7, "num_init_features": 16, "growth_rates": (16,) * 7},
    "samvit_base_patch16_224": VIT | {"global_attn_indexes": (1,)},
    "sequencer2d_s": SMALL | {"layers": FOUR, "embed_dims": (16,) * 4, "hidden_sizes": (8,) * 4},
    "tiny_vit_5m_224": {"depths": FOUR, "embed_dims": (8, 16, 16, 32), "num_heads": FOUR},
    "twins_svt_small": SMALL
    | {"depths": FOUR, "embed_dims": (8, 16, 16, 32), "num_heads": (1, 2, 2, 4)},
}


def timm():
    from timm import create_model

    def row(name, settings):
        size = settings.get("img_size", 32)
        build = lambda: create_model(name, pretrained=False, num_classes=3, **settings)  # noqa: E731
        less = "" if settings.keys() <= {"img_size"} else "narrower or shallower"
        return Row(build, images(size), of_logits, note=less)

    return {f"timm {name}": row(name, settings) for name, settings in sorted(TIMM.items())}


def graphs():
    from torch_geometric import nn as pyg

    sizes = {"in_channels": 3, "hidden_channels": 8, "num_layers": 2, "out_channels": 3}

    def edges(n):
        return real(n, 3), torch.randint(0, n, (2, 2 * n)), torch.arange(n) % 3

    def adjacency(n, sparse=False):
        x, (start, end), y = edges(n)
        dense = torch.zeros(n, n).index_put((start, end), torch.ones(())) + torch.eye(n)
        return x, dense.to_sparse() if sparse else dense, y

    kinds = {"GCN": pyg.GCN, "GraphSAGE": pyg.GraphSAGE, "GAT": pyg.GAT}
    rows = {name: Row(lambda k=k: k(**sizes), edges, of_logits) for name, k in kinds.items()}
    sparse = lambda n: adjacency(n, sparse=True)  # noqa: E731
    dense = lambda n: tuple(t[None] for t in adjacency(n))  # noqa: E731
    rows["GCN, sparse adjacency"] = Row(
        lambda: pyg.GCN(**sizes, normalize=False), sparse, of_logits
    )
    rows["GraphSAGE, sparse adjacency"] = Row(
        lambda: pyg.GraphSAGE(**sizes, aggr="sum"), sparse, of_logits
    )
    rows["DenseSAGEConv, dense adjacency"] = Row(lambda: pyg.DenseSAGEConv(3, 3), dense, of_logits)
    return {f"PyG {name}": row for name, row in rows.items()}


def segmentation():
    import segmentation_models_pytorch as smp
    from monai.networks.nets import UNet

    unet = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    few = {"encoder_depth": 3, "decoder_channels": (16, 8, 8), "encoder_weights": None}
    return {
        "MONAI UNet": Row(
            lambda: UNet(**unet, channels=(4, 8, 8), strides=(2, 2), num_res_units=1),
            masks(16, 1),
            of_logits,
        ),
        "smp Unet on ResNet-18": Row(
            lambda: smp.Unet("resnet18", classes=2, **few), masks(32, 3), of_logits
        ),
    }


class LogDensity(nn.Module):
    """A flow has no `forward` of its own."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x):
        return self.flow.log_prob(x)


def flows():
    from nflows import transforms
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow, MaskedAutoregressiveFlow

    spline = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
    steps = lambda: transforms.CompositeTransform(  # noqa: E731
        [
            spline(2, 8, tails="linear", tail_bound=3.0, num_bins=4, num_blocks=1),
            transforms.ReversePermutation(2),
        ]
    )
    points = lambda n: (real(n, 2), torch.zeros(n))  # noqa: E731
    unlikely = lambda out, y: -out.mean()  # noqa: E731
    kinds = {
        "MAF": lambda: MaskedAutoregressiveFlow(2, 8, num_layers=2, num_blocks_per_layer=1),
        "rational quadratic splines": lambda: Flow(steps(), StandardNormal([2])),
    }
    return {
        f"nflows {name}": Row(lambda make=make: LogDensity(make()), points, unlikely)
        for name, make in kinds.items()
    }


def others():
    import accelerate
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from e3nn import nn as e3
    from e3nn import o3

    def perceptron():
        return nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 3))

    def prepared():
        return accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(perceptron())

    def rows(n):
        return real(n, 3), torch.arange(n) % 3

    def vectors(n):
        return real(n, 5), real(n, 4), real(n, 2)

    def gate():
        return e3.Gate("2x0e", [torch.tanh], "1x0e", [torch.sigmoid], "1x1o")

    def equivariant():
        product = o3.FullyConnectedTensorProduct("2x0e+1x1o", "1x0e+1x1o", gate().irreps_in)
        return Equivariant(product, gate(), o3.Linear(gate().irreps_out, "2x0e"))

    class Equivariant(nn.Module):
        def __init__(self, product, gate, last):
            super().__init__()
            self.product, self.gate, self.last = product, gate, last

        def forward(self, x, y):
            return self.last(self.gate(self.product(x, y)))

    hooked = lambda: add_hook_to_module(perceptron(), AlignDevicesHook("cpu"))  # noqa: E731
    half = {"dtype": torch.float32, "tolerance": 5e-2, "note": "bfloat16"}
    return {
        "e3nn tensor product, gate, linear": Row(equivariant, vectors, F.mse_loss),
        "accelerate add_hook_to_module": Row(hooked, rows, of_logits),
        "accelerate prepare, mixed precision": Row(prepared, rows, of_logits, **half),
    }


GROUPS = (transformers, timm, graphs, segmentation, flows, others)


# ----------------------------------------------------------------------------------- one row


def built(row):
    """The model, and what of its parameters adapts, in words."""
    torch.manual_seed(0)
    model = row.build().to(row.dtype)
    *inputs, _ = row.batch(8)
    untouched.settled(model, inputs)
    named = dict(model.named_parameters())
    total = sum(p.numel() for p in named.values())
    if row.adapts:
        chosen, words = {n for n in named if any(a in n for a in row.adapts)}, "adapters"
    elif total <= 1_000_000:
        return model, "all"
    else:
        last = [n for n, p in named.items() if p.ndim >= 2][-1]
        chosen, words = {n for n, p in named.items() if p.ndim <= 1} | {last}, "norms, biases, head"
    for name, p in named.items():
        p.requires_grad_(name in chosen)
    share = sum(named[n].numel() for n in chosen)
    return model, f"{words} ({share:,} of {total:,})"


def episodes(row, *sizes):
    return [untouched.stacked([row.batch(n) for _ in range(TASKS)]) for n in sizes]


def draws(model, inputs):
    """Whether a call of the model draws random numbers."""
    before = torch.get_rng_state()
    untouched.called(model, inputs)
    return not torch.equal(before, torch.get_rng_state())


def advised(attempt):
    """`attempt(**settings)` with no settings, then with what its messages ask for."""
    settings, taken = {}, []
    while True:
        try:
            return attempt(**settings), settings, taken
        except Exception as error:
            new = [a for text, a in ADVICE.items() if text in str(error) and a[0] not in settings]
            if not new:
                raise
            settings |= {name: value for name, value, _ in new}
            taken += [words for *_, words in new]


def compared(row, *, training):
    """One mode of one row: what the table says of it."""
    torch.manual_seed(0)
    model, adapts = built(row)
    other, _ = built(row)  # the oracle's, made by the same calls
    model.train(training), other.train(training)
    other.load_state_dict(model.state_dict())
    support, query = episodes(row, 4, 3)
    inputs = untouched.part(support[:-1], 0)
    if training and draws(other, inputs):
        return None
    plain = untouched.Plain.well_conditioned(other, row.loss, support)
    untouched.called(model.eval(), inputs)
    remembered = untouched.Remembered(model.train(training), inputs)

    def attempt(**settings):
        meta = untouched.learner(model, plain, **settings)
        return meta, *untouched.errors(meta, plain, support, query)

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        (meta, product, gradient), settings, taken = advised(attempt)
        ours, theirs = [], []
        for _ in range(0 if training else TIMED):
            ours.append(timed(untouched.meta_gradient, meta, support, query))
            theirs.append(timed(plain.meta_gradient, support, query))
        for _ in range(0 if training else STEPS - TIMED):  # what they leave behind is what counts
            untouched.meta_gradient(meta, *episodes(row, 2, 2))
    looped = any("one by one" in str(w.message) for w in heard) or "batching" in settings
    return {
        "adapts": adapts,
        "product": product,
        "gradient": gradient,
        "changes": remembered.changes(),
        "how": "loop" if looped else "vmap",
        "ratio": statistics.median(ours) / statistics.median(theirs) if theirs else None,
        "taken": taken,
    }


def timed(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def tried(name, row):
    """A line of the table and what else there is to know."""
    found, verdicts = {}, {}
    torch.set_default_dtype(row.dtype)
    for mode in ("eval", "training"):
        try:
            result = compared(row, training=mode == "training")
        except Exception as error:  # whatever it is, the others are tried
            text = (str(error).splitlines() or [""])[0]
            verdicts[mode] = f"refused: {type(error).__name__}: {text[:MESSAGE]}"
        else:
            if result is not None:
                found[mode], verdicts[mode] = result, verdict(result, row.tolerance)
    torch.set_default_dtype(torch.float32)
    same = {v: [mode for mode, w in verdicts.items() if w == v] for v in verdicts.values()}
    line = {"model": name, "right": all(v.startswith("right") for v in same)}
    line["status"] = "; ".join(f"{v} ({', '.join(modes)})" for v, modes in same.items())
    each = list(found.values())
    if each:
        line |= {k: each[0][k] for k in ("adapts", "ratio")}
        line |= {k: worst(r[k] for r in each) for k in ("product", "gradient")}
        line["changes"] = sorted({c for r in each for c in r["changes"]})
        line["how"] = " / ".join(dict.fromkeys(r["how"] for r in each))
    package = VERSIONS.get(name.split()[0], name.split()[0])
    version = f"{package} {importlib.metadata.version(package)}"
    here = {k: machine()[k] for k in ("torch", "date", "processor")}
    return line | {"note": row.note, "version": version} | here


def worst(errors):
    return max(errors, key=lambda e: (e != e, e))  # NaN is the worst


def verdict(result, tolerance):
    numbers = [result["product"], result["gradient"]]
    faults = [] if worst(numbers) < tolerance else [", ".join(f"{e:.1e}" for e in numbers)]
    faults += [f"{what} changed" for what in result["changes"]]
    after = f" after {', '.join(result['taken'])}" if result["taken"] else ""
    return (f"wrong: {'; '.join(faults)}" if faults else "right") + after


# ----------------------------------------------------------------------------------- all rows


def page(rows):
    """The markdown page of what was tried."""
    right = sum(row["right"] for row in rows)
    date, torches, processors, versions = (
        ", ".join(sorted({row[key] for row in rows}))
        for key in ("date", "torch", "processor", "version")
    )

    def number(row, key, form):
        return "" if row.get(key) is None else format(row[key], form)

    def cells(row):
        changes = row.get("changes")
        return {
            "model": row["model"] + (f" ({row['note']})" if row["note"] else ""),
            "adapts": row.get("adapts", ""),
            "HVP error": number(row, "product", ".0e"),
            "meta-gradient error": number(row, "gradient", ".0e"),
            "module unchanged": "" if changes is None else ", ".join(changes) or "yes",
            "vmap or loop": row.get("how", ""),
            "time / plain torch": number(row, "ratio", ".1f"),
            "status": row["status"].replace("|", "\\|"),
        }

    return f"""# Models that were tried

`make zoo` takes models that nobody here wrote, with random weights, and compares a meta-step of two
tasks with the same meta-step in plain torch: two inner steps, three steps of conjugate gradients, and
the Hessian-vector products alone, with `torch.func.functional_call` on a module that the library has
never seen. Errors are relative, in float64 where nothing else is said, the larger one of eval and
training mode; models that draw random numbers in training mode were tried in eval mode alone. "Right"
means that both errors are below 1e-8 (1e-6 for a model that computes its norms in float32, 5e-2 in
bfloat16), and that after {STEPS} meta-steps the module has the same numbers, memory order, hooks, flags,
classes, attributes and outputs as before. Tasks go through the model together (vmap) or one by one
(loop). The time is that of a whole meta-step in eval mode, divided by that of the gradients and products
it is made of, in plain torch.

{right} of {len(rows)} rows are right. Written by `make zoo`, tried on {date} with torch {torches} on
{processors}, one thread a process, and {versions}.

{table([cells(row) for row in rows])}
"""


@functools.cache
def all_rows():
    rows = {}
    for group in GROUPS:
        try:
            rows |= group()
        except Exception as error:  # a package that is not here, or has changed
            tqdm.write(f"{group.__name__} are left out: {type(error).__name__}: {error}")
    return rows


def alone(name):
    """One row, in a process that tries several."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return tried(name, all_rows()[name])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of the rows to try anew")
    parser.add_argument("--fresh", action="store_true", help="try all rows anew")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    done, path = {}, RESULTS / "models.json"
    if path.exists() and not args.fresh:
        done = {row["model"]: row for row in json.loads(path.read_text())["rows"]}
    rows = all_rows()
    missing = [name for name in rows if name not in done]
    chosen = [n for n in rows if any(part in n for part in args.names)] if args.names else missing
    if not chosen:
        print(
            f"All {len(rows)} rows are there: --fresh tries them anew, a name those of that name."
        )
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=spawn) as pool:
        waiting = {pool.submit(alone, name): name for name in chosen}
        bar = tqdm(as_completed(waiting), total=len(chosen))
        for future in bar:
            name, error = waiting[future], future.exception()
            if error is not None:  # the process died: the row is tried again by the next run
                bar.write(f"{name}: {type(error).__name__}: {error}")
                continue
            done[name] = future.result()
            bar.write(f"{name}: {done[name]['status']}")
            save("models", [done[n] for n in rows if n in done])  # a kill loses one row
    PAGE.write_text(page([done[n] for n in rows if n in done]))


if __name__ == "__main__":
    main()
