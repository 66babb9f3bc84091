"""Which keys of a model's configuration are known, and what becomes of the others.

A key may change what a model computes, so none is passed over in silence: each is read, or has a
value at which it changes nothing, or is known to be harmless. Anything else is refused by name
(`check_keys`), and `--allow-unknown-config` goes on without it. What is known for every family
stands here; a family's file adds its own.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from jaxserve.core.errors import ConfigError
from jaxserve.models.config_values import shortened

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownKeys:
    """What is known of the keys of one family's configuration.

    Attributes:
        read: what the reader goes by.
        harmless: whatever they say, the model computes the same.
        harmless_prefixes: beginnings of more such keys.
        by_layer: keys of GGUF whose value may be a list with different values; it is not read.
        fixed: key -> the values at which it changes nothing; others are not supported.
        classes: transformers' classes that compute what is computed here; () asks for none.
    """

    read: frozenset[str]
    harmless: frozenset[str] = frozenset()
    harmless_prefixes: tuple[str, ...] = ()
    by_layer: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    classes: tuple[str, ...] = ()

    def plus(
        self,
        *,
        read: tuple[str, ...] = (),
        harmless: tuple[str, ...] = (),
        harmless_prefixes: tuple[str, ...] = (),
        by_layer: tuple[str, ...] = (),
        classes: tuple[str, ...] = (),
    ) -> "KnownKeys":
        """These and more; a key that is read here need not have a fixed value any more."""
        return KnownKeys(
            read=self.read | set(read),
            harmless=self.harmless | set(harmless),
            harmless_prefixes=self.harmless_prefixes + harmless_prefixes,
            by_layer=self.by_layer | set(by_layer),
            fixed={key: values for key, values in self.fixed.items() if key not in read},
            classes=self.classes + classes,
        )

    def only(self, *read: str) -> "KnownKeys":
        """These, but no more than `read` is read."""
        return dataclasses.replace(self, read=frozenset(read))


def check_keys(
    values: Mapping[str, Any], known: KnownKeys, where: str, *, allow_unknown: bool
) -> None:
    """Refuse a configuration that may ask for something else than what will be computed.

    Args:
        values: the configuration; null is the same as not there.
        known: what is known of its family's keys.
        where: what to call it in messages.
        allow_unknown: go on with keys that are not known, and say so in the log.

    Raises:
        ConfigError: a key has a value that is not supported, or (unless allowed) is not known.
    """
    unknown = []
    for key, value in values.items():
        if value is None or key in known.read or key in known.harmless:
            continue
        if key in known.fixed:
            if not any(_same(value, neutral) for neutral in known.fixed[key]):
                raise ConfigError(f"{where}: {key} = {shortened(value)} is not supported")
        elif not (key.startswith(known.harmless_prefixes) or _is_known_code(key, value, known)):
            unknown.append(f"{key} = {shortened(value)}")
    if not unknown:
        return
    listed = ", ".join(sorted(unknown)[:10]) + (", ..." if len(unknown) > 10 else "")
    if not allow_unknown:
        raise ConfigError(
            f"{where} has what jaxserve does not know and what may change the model's answers: "
            f"{listed}. Where it does not, --allow-unknown-config goes on without it"
        )
    log.warning("%s: not known here, and passed over as allowed: %s", where, listed)


def _same(value: Any, neutral: Any) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _is_known_code(key: str, value: Any, known: KnownKeys) -> bool:
    """Whether the key names code, and that code computes what is computed here."""
    if key == "architectures" and isinstance(value, list):
        return not known.classes or all(name in known.classes for name in value)
    if key == "auto_map" and isinstance(value, Mapping):  # a checkpoint's own code, by its role
        return not any(str(role).startswith(("AutoModel", "FlaxAuto", "TFAuto")) for role in value)
    return False


# ---------------------------------------------------------------- config.json

# What transformers writes for every model, and none of whose values changes a decoder's answer.
_HF_HARMLESS = frozenset({
    "transformers_version", "torch_dtype", "dtype", "use_cache", "cache_implementation",
    "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "hidden_dropout_prob", "dropout", "classifier_dropout", "pretraining_tp",
    "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class",
    "prefix", "finetuning_task", "task_specific_params", "id2label", "label2id", "num_labels",
    "problem_type", "return_dict", "output_hidden_states", "output_attentions", "torchscript",
    "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward", "is_decoder",
    "tie_encoder_decoder", "_name_or_path", "_commit_hash", "_attn_implementation",
    "_attn_implementation_autoset", "_attn_implementation_internal", "_flash_attn_2_enabled",
    "attn_implementation", "use_flash_attn", "use_flash_attention", "use_flash_attention_2",
    "flash_attn", "flash_attention", "gradient_checkpointing", "transformers.js_config",
    "model_max_length", "max_sequence_length", "tokenizer_model_max_length",
    "tokenizer_padding_side", "seq_length",
    "original_max_position_embeddings", "unsloth_version", "unsloth_fixed", "model_name",
    "neftune_noise_alpha", "is_llama_config",
    # Defaults of generation; see `core.sampling_defaults`.
    "max_length", "min_length", "max_new_tokens", "min_new_tokens", "do_sample", "early_stopping",
    "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "min_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens",
})  # fmt: skip

_HF_READ = frozenset({
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
    "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings",
    "hidden_act", "eos_token_id", "bos_token_id", "is_matryoshka", "matryoshka_dimensions",
})  # fmt: skip

_OFF = (False, 0)
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,), "use_bidirectional_attention": _OFF, "bidirectional": _OFF,
    "attention_bias": _OFF, "mlp_bias": _OFF, "lm_head_bias": _OFF, "partial_rotary_factor": (1,),
    "rope_interleaved": _OFF, "use_mrope": _OFF, "is_encoder_decoder": _OFF,
    "add_cross_attention": _OFF, "cross_attention_hidden_size": (0,), "pruned_heads": ({},),
    "num_local_experts": (0,), "num_experts": (0,), "num_experts_per_tok": (0,),
    "quantization_config": ({},), "quantization": ({},), "compression_config": ({},),
    "clip_qkv": (0,), "qk_norm": _OFF, "use_qk_norm": _OFF, "qk_layernorm": _OFF,
    "attn_logit_softcapping": (0,), "final_logit_softcapping": (0,), "embedding_multiplier": (1,),
    "attention_multiplier": (1,), "residual_multiplier": (1,), "logits_scaling": (1,),
    "logit_scale": (1,), "num_nextn_predict_layers": (0,),
}  # fmt: skip

HF_COMMON = KnownKeys(read=_HF_READ, harmless=_HF_HARMLESS, fixed=_HF_FIXED)

_ROPE_COMMON = KnownKeys(
    read=frozenset({"rope_type", "type", "rope_theta", "factor",
                    "original_max_position_embeddings"}),
    harmless=frozenset({"finetuned", "low_freq_factor", "high_freq_factor"}),
    fixed={"partial_rotary_factor": (1,), "attention_factor": (1,)},
)  # fmt: skip
# Of `rope_scaling`, or of one kind of layers in `rope_parameters`, by the kind of scaling.
ROPE_KEYS: dict[str, KnownKeys] = {
    "default": _ROPE_COMMON,
    "linear": _ROPE_COMMON,
    "dynamic": _ROPE_COMMON,
    "llama3": _ROPE_COMMON,
    "yarn": _ROPE_COMMON.plus(
        read=("attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim")
    ),
    "longrope": _ROPE_COMMON.plus(read=("attention_factor", "short_factor", "long_factor")),
}


# ---------------------------------------------------------------- GGUF

_GGUF_READ = frozenset({
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.sliding_window",
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scale_linear", "rope.scaling.original_context_length", "attn_logit_softcapping",
    "final_logit_softcapping", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
})  # fmt: skip
_GGUF_FIXED: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "expert_count": (0,), "expert_used_count": (0,),
    "attention.max_alibi_bias": (0,), "attention.clamp_kqv": (0,), "attention.scale": (0,),
    "logit_scale": (0, 1), "embedding_scale": (0, 1), "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (0, 1), "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_attn_factor": (0, 1), "use_parallel_residual": _OFF,
    "nextn_predict_layers": (0,),
}  # fmt: skip
_GGUF_HARMLESS = frozenset({
    "rope.scaling.finetuned", "attention.layer_norm_epsilon", "tensor_data_layout",
    "pooling_type",  # of embeddings: --embedding-pooling says how
})  # fmt: skip

GGUF_COMMON = KnownKeys(read=_GGUF_READ, harmless=_GGUF_HARMLESS, fixed=_GGUF_FIXED)
