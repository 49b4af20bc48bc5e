"""The plain Vision Transformer against torch's own attention and convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neurocl.backbones.vit import Attention, VisionTransformer, VitConfig
from neurocl.errors import UserError


def test_attention_equals_torchs_multi_head_attention():
    ours, peer = Attention(24, 3).double(), nn.MultiheadAttention(24, 3, batch_first=True).double()
    with torch.no_grad():
        peer.in_proj_weight.copy_(ours.qkv.weight)
        peer.in_proj_bias.copy_(ours.qkv.bias)
        peer.out_proj.weight.copy_(ours.proj.weight)
        peer.out_proj.bias.copy_(ours.proj.bias)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x), peer(x, x, x, need_weights=False)[0], rtol=1e-10, atol=1e-12)


def test_the_whole_network_equals_torchs_encoder_layers():
    config = VitConfig(input_shape=(6, 10), width=16, depth=2, heads=2, embed_dim=5)
    ours = VisionTransformer(config).double().eval()
    x = torch.randn(3, 6, 10, dtype=torch.float64)
    tokens = torch.cat([ours.cls_token.expand(3, -1, -1), ours.patch_embed(x)], dim=1) + ours.pos_embed
    for block in ours.blocks:
        layer = nn.TransformerEncoderLayer(
            16, 2, 64, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True, dtype=torch.float64
        ).eval()
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": block.attn.qkv.weight,
                "self_attn.in_proj_bias": block.attn.qkv.bias,
                "self_attn.out_proj.weight": block.attn.proj.weight,
                "self_attn.out_proj.bias": block.attn.proj.bias,
                "linear1.weight": block.mlp.fc1.weight,
                "linear1.bias": block.mlp.fc1.bias,
                "linear2.weight": block.mlp.fc2.weight,
                "linear2.bias": block.mlp.fc2.bias,
                "norm1.weight": block.norm1.weight,
                "norm1.bias": block.norm1.bias,
                "norm2.weight": block.norm2.weight,
                "norm2.bias": block.norm2.bias,
            }
        )
        tokens = layer(tokens)
    torch.testing.assert_close(ours(x), ours.head(ours.norm(tokens[:, 0])), rtol=1e-9, atol=1e-11)


def test_pictures_are_cut_into_patches_row_by_row():
    model = VisionTransformer(VitConfig(input_shape=(2, 4, 6), patch_size=2, width=8, depth=1, heads=2, embed_dim=3))
    picture = torch.randn(1, 2, 4, 6)
    patches = F.unfold(picture, 2, stride=2).transpose(1, 2)
    by_hand = patches @ model.patch_embed.weight.flatten(1).T + model.patch_embed.bias
    torch.testing.assert_close(model.patch_embed(picture).flatten(2).transpose(1, 2), by_hand)
    assert model.pos_embed.shape == (1, 7, 8)
    assert model(picture).shape == (1, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_shape": (1, 8, 9)}, "8 x 9 do not divide into patches of 2"),
        ({"heads": 3}, "width 8 is not a multiple of 3 heads"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(changes, message):
    values = {"input_shape": (1, 8, 8), "patch_size": 2, "width": 8, "heads": 2, **changes}
    with pytest.raises(UserError, match=message):
        VisionTransformer(VitConfig(**values))
