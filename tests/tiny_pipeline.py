"""A text-to-image pipeline of diffusers in miniature, without a text encoder: the prompt's bytes are its embedding."""

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class TinyTextToImage(DiffusionPipeline):
    """Random weights; made to be saved to a folder and read back by its name."""

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDIMScheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt, height, width, num_inference_steps, guidance_scale, generator, output_type):
        assert output_type == "np"
        letters = [list(text.encode()[:32].ljust(32)) for text in prompt]
        embedding = torch.tensor(letters, dtype=self.unet.dtype).view(-1, 4, 8) / 64 - 1
        images = randn_tensor((len(prompt), 3, height, width), generator=generator, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        for level in self.scheduler.timesteps:
            named = self.unet(images, level, encoder_hidden_states=embedding).sample
            plain = self.unet(images, level, encoder_hidden_states=torch.zeros_like(embedding)).sample
            images = self.scheduler.step(plain + guidance_scale * (named - plain), level, images).prev_sample
        return ImagePipelineOutput(images=(images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy())


def save_tiny_pipeline(folder):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    TinyTextToImage(unet, DDIMScheduler(num_train_timesteps=20)).save_pretrained(folder)
