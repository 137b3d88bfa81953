"""What the reference scripts share: models, files that appear whole, how a golden was made."""

import json
import os
import pathlib
import shlex
import sys
import tempfile
from importlib.metadata import version

import torch
from safetensors.torch import load_file, save_file

NOTEBOOK_SOURCE = (
    "get standalone-gemma3.ipynb or standalone-gemma3-plus-kvcache.ipynb from "
    "github.com/rasbt/LLMs-from-scratch, folder ch05/12_gemma3"
)


def provenance(**more):
    """String values for a golden's metadata: the command and the versions that made it.

    Paths in the command are cut to their last part: the rest belongs to one machine.
    """
    words = [pathlib.Path(word).name if "/" in word else word for word in sys.argv]
    record = {
        "command": "python tests/reference/" + shlex.join(words),
        "python": sys.version.split()[0],
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    return record | {key: str(value) for key, value in more.items()}


def write_whole(path, write):
    """Calls write(temporary path) in the folder of `path`, then renames: no half-written golden."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def save_tensors(path, tensors, metadata):
    """safetensors; every tensor becomes contiguous and owns its memory."""
    tensors = {name: x.detach().clone().contiguous() for name, x in tensors.items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def save_json(path, value):
    """One line per top-level entry: compact, yet a change shows in a diff."""
    entries = (f"{json.dumps(k)}:{_compact(v)}" for k, v in value.items())
    text = "{\n" + ",\n".join(entries) + "\n}\n"
    write_whole(path, lambda temporary: pathlib.Path(temporary).write_text(text, encoding="utf-8"))


def _compact(value):
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("},{", "},\n{")


def transformers_model(folder, dtype, attention="eager"):
    """Gemma3ForCausalLM from an HF folder, in evaluation mode."""
    from transformers import Gemma3ForCausalLM

    options = {"dtype": dtype, "attn_implementation": attention}
    return Gemma3ForCausalLM.from_pretrained(folder, **options).eval()


def notebook_namespace(path):
    """The classes and functions of the user's own copy of a reference notebook, as a dict.

    Runs only the cells that define the model; ValueError if the file is not such a notebook.
    """
    wanted = ("class ", "def compute_rope", "def load_weights", "GEMMA3_CONFIG_270M =")
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"[notebook] {path} not found. Hint: {NOTEBOOK_SOURCE}")
    space = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        is_model_code = any(word in source for word in wanted) and "GemmaTokenizer" not in source
        if cell["cell_type"] == "code" and is_model_code:
            exec(compile(source, str(path), "exec"), space)
    if "Gemma3Model" not in space:  # some other notebook
        raise ValueError(f"[notebook] {path} has no Gemma3Model. Hint: {NOTEBOOK_SOURCE}")
    return space


def notebook_model(space, folder, dtype):
    """The notebook's Gemma3Model with the weights of an HF folder, in evaluation mode."""
    from transformers import AutoConfig

    hf = AutoConfig.from_pretrained(folder)
    rope = hf.rope_parameters
    plain = all(rope[kind]["rope_type"] == "default" for kind in set(hf.layer_types))
    if not plain or hf.rms_norm_eps != 1e-6:
        raise ValueError(
            f"[notebook] {folder}: the notebook has no rope scaling and fixes eps at 1e-6"
        )
    config = {
        "vocab_size": hf.vocab_size,
        "context_length": hf.max_position_embeddings,
        "emb_dim": hf.hidden_size,
        "n_heads": hf.num_attention_heads,
        "n_layers": hf.num_hidden_layers,
        "hidden_dim": hf.intermediate_size,
        "head_dim": hf.head_dim,
        "qk_norm": True,
        "n_kv_groups": hf.num_key_value_heads,
        "rope_local_base": rope["sliding_attention"]["rope_theta"],
        "rope_base": rope["full_attention"]["rope_theta"],
        "sliding_window": hf.sliding_window,
        "layer_types": hf.layer_types,
        "query_pre_attn_scalar": hf.query_pre_attn_scalar,
        "dtype": dtype,
    }
    weights = {}
    for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
        weights |= load_file(file)
    model = space["Gemma3Model"](config)
    space["load_weights_into_gemma"](model, config, weights)
    return model.eval()


@torch.no_grad()
def logits_in_pieces(model, ids, rows=128):
    """Yields (first position, logits (rows, V)) of one sequence: never a whole (T, V) tensor."""
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
    for start in range(0, len(ids), rows):
        yield start, model.lm_head(hidden[start : start + rows])
