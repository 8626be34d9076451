"""Parts of the small pipelines of pipelines.py: networks, VAEs, text encoders, tokenizers trained on some sentences."""

SENTENCES = [
    "a red ball moves right fast then turns back",
    "a blue square moves down slowly then stops with a green cross",
    "a yellow cross moves left and a purple ball goes up",
    "the camera follows a cat that runs over wet sand at sunset, and the waves come in",
    "A man with short gray hair plays a red electric guitar.",
]
TEXT_DIM, IMAGE_DIM, BLOCKS = 32, 8, 4
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_DIM,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": BLOCKS,
}
HUNYUAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": TEXT_DIM,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}
HUNYUAN15 = {
    "in_channels": 65,
    "out_channels": 32,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": BLOCKS,
    "text_embed_dim": TEXT_DIM,
    "text_embed_2_dim": 1472,
    "image_embed_dim": IMAGE_DIM,
    "rope_axes_dim": (4, 4, 4),
}


def wan_parts() -> dict:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = unigram_tokenizer()
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": UMT5EncoderModel(text),
        "vae": AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
    }


def hunyuan_parts() -> dict:
    from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    clip_tokenizer = bpe_tokenizer(["<|startoftext|>", "<|endoftext|>"], "<|startoftext|>", "<|endoftext|>")
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
    )
    return {
        "tokenizer": llama_tokenizer(),
        "tokenizer_2": clip_tokenizer,
        "text_encoder_2": CLIPTextModel(clip),
        "vae": AutoencoderKLHunyuanVideo(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
    }


def llama_config(tokenizer):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def clip_processor(size: int):
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def unigram_tokenizer():
    """A T5-like tokenizer: pieces with a leading mark, `</s>` at the end, `<pad>` has the index 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def qwen_tokenizer():
    """A Qwen2.5-like tokenizer; its chat template makes 108 tokens of the system message: the pipeline cuts them."""
    tokenizer = bpe_tokenizer(["<|im_start|>", "<|im_end|>", "<|endoftext|>"], None, None, pad="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ '<|im_start|>' * 108 }}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    tokenizer.padding_side = "right"
    return tokenizer


def llama_tokenizer():
    """A Llama-3-like tokenizer: each word of the pipelines' templates is one token, as in the real one."""
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>", "<pad>"]
    return bpe_tokenizer(special, "<|begin_of_text|>", None, pad="<pad>")


def bpe_tokenizer(special: list[str], bos: str | None, eos: str | None, pad: str | None = None):
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    templates = [
        module.DEFAULT_PROMPT_TEMPLATE["template"]
        for module in (pipeline_hunyuan_video, pipeline_hunyuan_video_image2video)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*SENTENCES, *templates], trainer)
    ends = " ".join(word for word in (bos, "$A", eos) if word)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=ends, special_tokens=[(t, tokenizer.token_to_id(t)) for t in (bos, eos) if t]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad or eos,
        additional_special_tokens=special,
    )
