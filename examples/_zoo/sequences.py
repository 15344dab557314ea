"""Sequences that are no image: audio, embeddings, molecules."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from .base import BATCH, TEXT, Sample, entry, mask, normal, shares, steps

LENGTH = 24
"""Tokens of the sequence that is denoised."""
LINE = (1, 1, LENGTH)


@entry
def stable_audio_3() -> Sample:
    """Differential attention, learnt tokens in front of the audio, and a condition added between the layers' branches."""
    return Sample(
        diffusers.StableAudio3DiTModel(
            io_channels=6, embed_dim=32, depth=2, num_heads=2, cond_token_dim=20, global_cond_dim=12,
            local_add_cond_dim=7, timestep_features_dim=16, ff_mult=2.0, num_memory_tokens=5,
        ),
        {"hidden_states": normal(BATCH, 6, LENGTH), "timestep": shares(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "global_hidden_states": normal(BATCH, 12),
         "encoder_attention_mask": mask().bool(), "local_add_cond": normal(BATCH, 7, LENGTH)},
        grid=LINE,
    )  # fmt: skip


@entry
def ace_step() -> Sample:
    """A window of keys around each query in every second layer; patches cut out of an odd number of frames."""
    return Sample(
        diffusers.AceStepTransformer1DModel(
            hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, in_channels=14, audio_acoustic_hidden_dim=6, sliding_window=5, encoder_hidden_size=20,
        ),
        {"hidden_states": normal(BATCH, 2 * LENGTH - 1, 6), "timestep": shares(), "timestep_r": 0.9 * shares(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "context_latents": normal(BATCH, 2 * LENGTH - 1, 8)},
        grid=LINE,
    )  # fmt: skip


@entry
def longcat_audio() -> Sample:
    """Audio of two lengths: hidden frames are no keys and give zeros; a skip connection around all layers."""
    return Sample(
        diffusers.LongCatAudioDiTTransformer(dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=20, latent_dim=6),
        {"hidden_states": normal(BATCH, LENGTH, 6), "timestep": shares(),
         "encoder_hidden_states": normal(BATCH, TEXT, 20), "encoder_attention_mask": mask().bool(),
         "attention_mask": mask(LENGTH, 3).bool(), "latent_cond": normal(BATCH, LENGTH, 6)},
        grid=LINE,
    )  # fmt: skip


@entry
def minimax_music_3() -> Sample:
    """The time is a token of its own in front of the audio; no gates."""
    return Sample(
        diffusers.MiniMaxMusic3Transformer1DModel(
            in_channels=6, condition_dim=20, num_layers=2, num_attention_heads=2, attention_head_dim=16,
            ff_inner_dim=40, rotary_dim=8, fourier_embedding_dim=16,
        ),
        {"hidden_states": normal(BATCH, 6, LENGTH), "timestep": shares(),
         "encoder_hidden_states": normal(BATCH, LENGTH, 20)},
        grid=LINE,
    )  # fmt: skip


class _Film(diffusers.T5FilmDecoder):  # type: ignore[misc]
    """Takes, and ignores, the argument that the other models take."""

    def forward(self, *, return_dict: bool = False, **inputs: Any) -> Tensor:
        return super().forward(**inputs)  # type: ignore[no-any-return]


@entry
def t5_film() -> Sample:
    """Attention with the T5's unscaled products; the masks of two encoded sequences side by side."""
    return Sample(
        _Film(
            input_dims=6, targets_length=LENGTH, d_model=32, num_layers=2, num_heads=2, d_kv=8, d_ff=40,
        ),
        {"decoder_input_tokens": normal(BATCH, LENGTH, 6), "decoder_noise_time": shares(),
         "encodings_and_masks": [(normal(BATCH, TEXT, 32), mask()), (normal(BATCH, 5, 32), mask(5, 1))]},
        time="decoder_noise_time",
        latents="decoder_input_tokens",
        grid=LINE,
    )  # fmt: skip


@entry
def prior() -> Sample:
    """Causal attention over a text, conditions and one token that becomes an embedding."""
    return Sample(
        diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=12, num_embeddings=TEXT,
        ),
        {"hidden_states": normal(BATCH, 12), "timestep": steps(1)[0], "proj_embedding": normal(BATCH, 12),
         "encoder_hidden_states": normal(BATCH, TEXT, 12), "attention_mask": mask().bool()},
    )  # fmt: skip


@entry
def prior_shap_e() -> Sample:
    """A sequence of latents behind one condition and the time."""
    return Sample(
        diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=12, num_embeddings=LENGTH,
            additional_embeddings=0, time_embed_act_fn="gelu", norm_in_type="layer", encoder_hid_proj_type=None,
            added_emb_type=None, time_embed_dim=40, embedding_proj_dim=10, embedding_proj_norm_type="layer",
            clip_embed_dim=24,
        ),
        {"hidden_states": normal(BATCH, LENGTH, 12), "timestep": steps(1)[0], "proj_embedding": normal(BATCH, 10)},
        grid=LINE,
    )  # fmt: skip


@entry
def proteina() -> Sample:
    """Attention with a bias of pairs of tokens, which are a stream of their own; two clocks; hidden tokens stay zeros."""
    features = {
        "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type", "secondary_structure"),
        "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining"),
        "feats_pair_repr": ("xt_bb_ca_pair_dists", "bond_mask", "molecule_idx_pair", "token_bond_path_length"),
    }
    tokens = 11
    return Sample(
        diffusers.RFD4ProteinaTransformer(
            nlayers=3, token_dim=32, nheads=2, dim_cond=12, pair_repr_dim=10, latent_dim=5, token_type_emb_dim=6,
            t_emb_dim=16, seq_sep_dim=8, xt_pair_dist_dim=9, tri_mult_c=7, num_sequence_classes=13, **features,
        ),
        {"bb_ca": normal(BATCH, tokens, 3), "local_latents": normal(BATCH, tokens, 5), "bb_ca_time": shares(),
         "local_latents_time": 0.7 * shares(), "padding_mask": mask(tokens).bool(),
         "token_type": torch.randint(0, 7, (BATCH, tokens)),
         "conditioning": {
             "is_in_context_conditioning": torch.arange(tokens).expand(BATCH, -1) < 2,
             "supports_local_latent": torch.arange(tokens).expand(BATCH, -1) > 0,
             "condition_secondary-structure_1_residue": torch.randint(0, 4, (BATCH, tokens)),
             "bond_mask": torch.randint(0, 2, (BATCH, tokens, tokens)),
             "molecule_iid": torch.arange(tokens).expand(BATCH, -1) // 4,
             "token_bond_path_length": torch.randint(0, 9, (BATCH, tokens, tokens))}},
        time="bb_ca_time",
        latents="bb_ca",
        grid=(1, 1, tokens),
    )  # fmt: skip
