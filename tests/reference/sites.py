"""Records every probe site of one forward pass, under gemma_torch's site names.

Axis letters: B batch, T tokens, E emb_dim, H heads, G kv groups, D head_dim, F hidden_dim, V vocab.
Everything is what the reference itself computed, caught by hooks, except:
  transformers  `scores`, formed again from the captured rotated q and k (its own expression);
  notebook      `scores` and `pattern`, formed again likewise with the mask the module was given.
"""

from unittest import mock

import torch


class Recorder:
    """Fills .sites (name -> tensor) while a model runs; hooks are removed by close()."""

    def __init__(self, wanted=lambda site: True):
        self.sites = {}
        self._wanted = wanted
        self._handles = []

    def put(self, name, x):
        if self._wanted(name.rsplit(".", 1)[-1]):
            self.sites[name] = x.detach().clone().contiguous()

    def on_output(self, module, name, shape=lambda x: x):
        def hook(_module, _args, output):
            self.put(name, shape(output[0] if isinstance(output, tuple) else output))

        self._handles.append(module.register_forward_hook(hook))

    def on_input(self, module, name, shape=lambda x: x):
        def hook(_module, args, kwargs):
            self.put(name, shape(args[0] if args else kwargs["hidden_states"]))

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def close(self):
        for handle in self._handles:
            handle.remove()


def _hook_block(record, at, block, attention, mlp, head_dim):
    """Sites that are inputs or outputs of modules in both references."""

    def by_head(x):
        return x.unflatten(-1, (-1, head_dim))  # (B, T, H*D) -> (B, T, H, D)

    record.on_input(block, at + "resid_pre")
    record.on_output(block.input_layernorm, at + "attn_in")
    record.on_output(attention["q_norm"], at + "q")
    record.on_output(attention["k_norm"], at + "k")
    record.on_output(attention["v"], at + "v", lambda x: by_head(x).transpose(1, 2))
    record.on_input(attention["out"], at + "z", by_head)
    record.on_output(attention["out"], at + "attn_proj")
    record.on_output(block.post_attention_layernorm, at + "attn_out")
    record.on_input(block.pre_feedforward_layernorm, at + "resid_mid")
    record.on_output(block.pre_feedforward_layernorm, at + "mlp_in")
    record.on_output(mlp["gate"], at + "gate")
    record.on_output(mlp["up"], at + "up")
    record.on_input(mlp["down"], at + "mlp_act")
    record.on_output(mlp["down"], at + "mlp_proj")
    record.on_output(block.post_feedforward_layernorm, at + "mlp_out")
    record.on_output(block, at + "resid_post")


def transformers_sites(model, ids, wanted=lambda site: True):
    """Sites of Gemma3ForCausalLM with eager attention for ids (B, T) -> {name: tensor}."""
    from transformers.models.gemma3 import modeling_gemma3 as gemma

    record = Recorder(wanted)
    record.on_output(model.model.embed_tokens, "embed")
    for n, layer in enumerate(model.model.layers):
        att, mlp = layer.self_attn, layer.mlp
        attention = {"q_norm": att.q_norm, "k_norm": att.k_norm, "v": att.v_proj, "out": att.o_proj}
        feed_forward = {"gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj}
        _hook_block(record, f"blocks.{n}.", layer, attention, feed_forward, att.head_dim)
    record.on_output(model.model.norm, "final_norm")
    record.on_output(model.lm_head, "logits")
    attend = gemma.eager_attention_forward

    def recording(module, query, key, value, attention_mask, **options):
        at = f"blocks.{module.layer_idx}."
        record.put(at + "rot_q", query)
        record.put(at + "rot_k", key)
        keys = gemma.repeat_kv(key, module.num_key_value_groups)
        record.put(at + "scores", torch.matmul(query, keys.transpose(2, 3)) * module.scaling)
        output, pattern = attend(module, query, key, value, attention_mask, **options)
        record.put(at + "pattern", pattern)
        return output, pattern

    try:
        with torch.no_grad(), mock.patch.object(gemma, "eager_attention_forward", recording):
            model(ids, use_cache=False)
    finally:
        record.close()
    return record.sites


def notebook_sites(model, space, ids, wanted=lambda site: True):
    """Sites of the notebook's Gemma3Model for ids (B, T) -> {name: tensor}."""
    record = Recorder(wanted)
    record.on_input(model.blocks[0], "embed")  # the scale is applied outside tok_emb
    rotated, rotate = [], space["apply_rope"]

    def recording_rope(*args, **kwargs):
        rotated.append(rotate(*args, **kwargs))  # of each block q first, then k
        return rotated[-1]

    def attention_hook(at):
        def hook(att, args, _kwargs, _output):
            q, k = rotated
            rotated.clear()
            record.put(at + "rot_q", q)
            record.put(at + "rot_k", k)
            keys = k.repeat_interleave(att.group_size, dim=1)
            scores = (q * att.scaling) @ keys.transpose(2, 3)
            record.put(at + "scores", scores)
            hidden = args[1]  # (T, T), true where a key is not attended to
            record.put(
                at + "pattern", torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
            )

        return hook

    for n, block in enumerate(model.blocks):
        att, ff = block.att, block.ff
        attention = {
            "q_norm": att.q_norm,
            "k_norm": att.k_norm,
            "v": att.W_value,
            "out": att.out_proj,
        }
        feed_forward = {"gate": ff.fc1, "up": ff.fc2, "down": ff.fc3}
        _hook_block(record, f"blocks.{n}.", block, attention, feed_forward, att.head_dim)
        hook = attention_hook(f"blocks.{n}.")
        record._handles.append(att.register_forward_hook(hook, with_kwargs=True))
    record.on_output(model.final_norm, "final_norm")
    record.on_output(model.out_head, "logits")
    try:
        with torch.no_grad(), mock.patch.dict(space, {"apply_rope": recording_rope}):
            model(ids)
    finally:
        record.close()
    return record.sites
