"""The default config: all keys, with their meaning and default values.

Other configs start from it and change what differs:

  from diffusion_jax.configs import default

  def get_config():
    config = default.get_config()
    config.optim.lr = 2e-5
    return config

The functions after get_config have the keys of groups with another name:

    config.codec = default.autoencoder()
    config.codec.channels = 32

The import also works in your own config files, in any folder, and can name any
other config in place of `default`. `train --config=FILE --print_config` prints
the resolved config. Keys missing from a config have the defaults of this file.
The defaults follow arXiv 2006.11239 where it gives a value.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.seed = 0  # for initial parameters, data order and all noise
  config.num_steps = 500_000  # training steps
  config.batch_size = 128  # images per step, over all devices
  # Number of pieces that a batch is processed in, one after the other. More
  # pieces need less memory; results differ only by rounding.
  config.microbatches = 1
  # Steps in one call of the compiled program, which saves time where the host
  # is slow. Divides num_steps and the intervals; signals are seen in between.
  config.steps_per_dispatch = 1

  # Intervals in steps; 0 = never.
  config.log_every = 100  # metrics
  config.eval_every = 5_000  # held-out loss
  config.eval_images = 0  # number of held-out images to use; 0 = all
  config.sample_every = 10_000  # a grid of samples
  config.checkpoint_every = 5_000
  config.keep_last = 2  # number of newest checkpoints to keep
  config.keep_every = 100_000  # keep checkpoints at multiples of this forever

  # Number of devices along each mesh axis; -1 = all remaining devices.
  config.mesh = ConfigDict()
  config.mesh.data = -1  # replicates the parameters, splits the batch
  config.mesh.fsdp = 1  # splits the parameters and the batch
  config.mesh.tensor = 1  # splits the channels

  config.data = ConfigDict()
  # 'folder', 'arrays', 'webdataset', 'digits', 'emoji' or 'tfds:NAME'
  config.data.name = 'folder'
  # The folder or file; for TFDS data_dir and for emoji the font, '' = default.
  config.data.path = ''
  # 'train', or 'all': held-out images, too; of TFDS any of its splits.
  config.data.train_split = 'train'
  config.data.heldout_split = 'test'  # '' = none
  # For 'folder', 'arrays' and 'webdataset' without test images: hold out every
  # n-th image, 0 = none.
  config.data.heldout_every = 0
  # Pixels per side; files and TFDS sets are cropped to squares and resized.
  config.data.image_size = 32
  config.data.channels = 3  # 1 = grey, 3 = RGB
  # For 'folder': 'folders' = sub-folders are classes, 'none' = no labels,
  # 'auto' = as their names say, see docs/data.md.
  config.data.classes = 'auto'
  # The column of captions, for conditioning.name='text'; 'auto' looks for one,
  # see docs/data.md.
  config.data.captions = 'auto'
  # Bits of a grey sample in image files, such as 12 for values up to 4095; 0 =
  # as the file says.
  config.data.bits = 0
  # Leave broken images out, and train on the next whole one in their place.
  # False = end the run, saved, with the name of the image.
  config.data.skip_broken = False
  # Keep all training images in the memory of each device.
  config.data.on_device = False
  config.data.flip = True  # mirror training images with probability 1/2
  # Flip, scale, rotate, stretch and move training images, with this probability
  # each, and tell the network, so that samples are not transformed (EDM).
  config.data.augment = 0.0

  # Maps data to x0, the variable that is diffused.
  config.codec = ConfigDict()
  # 'pixels': images scaled to [-1, 1]; 'autoencoder': the run trains one;
  # 'latents': those of a trained one. The last two have keys of their own, see
  # below.
  config.codec.name = 'pixels'

  # Network inputs other than the noised data and the time.
  config.conditioning = ConfigDict()
  # 'none', 'label', class labels of the data, or captions: 'text' trains an
  # encoder of them, 'frozen_text' takes trained ones. Both have keys of their
  # own, see below.
  config.conditioning.name = 'none'
  # For 'label': the number of classes of the data.
  config.conditioning.num_classes = 0
  # For 'label': the probability with which training drops the label of an
  # image, so that the network can also sample without one and be guided.
  config.conditioning.drop = 0.1

  # Networks that sharpen pictures, see docs/super_resolution.md.
  config.super_resolution = ConfigDict()
  # How many times larger the sides of images are than those of the pictures of
  # low resolution that they are drawn for; 0 = there are none.
  config.super_resolution.factor = 0
  # How training makes them of images: 'mean' of blocks, or 'bicubic'.
  config.super_resolution.by = 'mean'
  # The largest deviation of noise on them in training, of which the network is
  # told, in units of [-1, 1]; 0 = none.
  config.super_resolution.noise = 0.0

  config.model = ConfigDict()
  # 'unet', 'dit', a transformer, see docs/networks.md, or 'encoder', of a
  # classifier, see docs/conditions.md, or of pictures, see docs/text.md.
  config.model.name = 'unet'
  config.model.channels = 128  # at full resolution; of 'dit', in all blocks
  config.model.num_blocks = 2  # residual blocks per level; of 'dit', blocks
  config.model.num_heads = 1  # attention heads
  # Of 'dit': pixels per side of a patch.
  config.model.patch_size = 2
  # Of 'unet' only, like the keys up to details.
  config.model.multipliers = (1, 2, 2, 2)  # of the channels, one per level
  config.model.attention_resolutions = (16,)  # map sizes with attention
  # In place of attention_resolutions: the blocks of the transformers of each
  # level and of the middle, such as (1, 1, 1, 0, 1); 0 = no attention there.
  config.model.transformer_depths = ()
  # Channels of each attention head, in place of num_heads; 0 = num_heads.
  config.model.head_channels = 0
  config.model.num_groups = 32  # groups of group normalisation
  # Whose U-Net: 'ddpm', 'iddpm', 'adm', 'ddpmpp' (EDM's) or 'diffusers'.
  config.model.style = 'ddpm'
  # Details that differ from the style's, such as {'epsilon': 1e-5}; of 'dit',
  # from the paper's.
  config.model.details = ConfigDict()
  # Factor on the times or noise levels that the network embeds.
  config.model.time_scale = 1.0
  config.model.dropout = 0.0  # dropout rate of residual blocks or perceptrons
  config.model.dtype = 'float32'  # or 'bfloat16', faster on TPUs and GPUs
  # What the backward pass computes again, in order to need less memory: 'none',
  # 'blocks' (residual blocks and attention) or 'all' (whole levels).
  config.model.remat = 'none'
  # Names of measures of docs/speed.md that are not taken, for benchmarks.
  config.model.plain = ()

  # Low-rank changes of another run's network, which are trained in place of it,
  # see docs/lora.md.
  config.lora = ConfigDict()
  config.lora.rank = 0  # of the changes; 0 = none, the network is trained
  # The changes are multiplied by alpha / rank; 0 = by 1.
  config.lora.alpha = 0.0
  # 'attention', 'all-linear', 'all', or names of layers, such as 'cross/*'.
  config.lora.layers = ('attention',)

  # The forward process: the noise at each time, see docs/objectives.md.
  config.process = ConfigDict()
  # 'linear' (arXiv 2006.11239), 'scaled_linear' = 'quadratic', 'cosine',
  # 'sigmoid', 'edm', 'flow'; or 'betas', 'alpha_bar' from a file.
  config.process.schedule = 'linear'
  config.process.num_timesteps = 1000
  config.process.beta_start = 1e-4  # for linear, scaled_linear and sigmoid
  config.process.beta_end = 0.02
  config.process.sigma_min = 0.002  # for edm: the lowest sigma / alpha
  config.process.sigma_max = 80.0  # and the highest
  config.process.path = ''  # for betas and alpha_bar: .npy, .json or .txt
  config.process.sha256 = ''  # of that file; set when a run begins
  config.process.zero_snr = False  # rescale it to end in pure noise
  # Multiplies sigma / alpha at all times, for larger images.
  config.process.shift = 1.0

  config.loss = ConfigDict()
  # 'denoising': the error of the prediction; 'classification': a classifier of
  # noised images, see docs/conditions.md. 'autoencoding' and 'dito' train
  # autoencoders, 'contrastive' a pair of encoders, of pictures and captions;
  # they have keys of their own, see below.
  config.loss.name = 'denoising'
  # What the network predicts: 'eps', 'x0', 'v', 'edm' or 'flow', see
  # docs/objectives.md.
  config.loss.prediction = 'eps'
  config.loss.sigma_data = 0.5  # for 'edm': the data's standard deviation
  # What the network is told of the noise: 'auto', the time, or what the
  # prediction says; or 'alpha', sqrt(alpha_bar), which model.time_scale
  # multiplies (SR3).
  config.loss.level = 'auto'
  # The times of training: 'uniform', 'stratified', 'importance'; 'levels':
  # sqrt(alpha_bar) is uniform between whole times (SR3); or log(sigma / alpha)
  # is normal: 'lognormal' (EDM), 'logitnormal' (flow).
  config.loss.law = 'uniform'
  config.loss.law_mean = 0.0  # of log(sigma / alpha)
  config.loss.law_std = 0.0  # 0 = the published mean and deviation
  # The weight of each noise level: 'simple' (none), 'bound', 'min_snr', 'p2',
  # 'sigmoid', 'truncated_snr' or 'edm'.
  config.loss.weight = 'simple'
  config.loss.gamma = 0.0  # of min_snr and p2; 0 = as published: 5 and 1
  config.loss.k = 1.0  # of p2, added to the signal-to-noise ratio
  config.loss.bias = 2.0  # of sigmoid
  # Errors above this count linearly (pseudo-Huber); 0 = the squared error.
  config.loss.huber = 0.0
  # 'fixed', or 'learned': the network also predicts the variance of a step.
  config.loss.variance = 'fixed'
  config.loss.variance_weight = 0.001  # of the bound that trains it

  config.optim = ConfigDict()
  # 'adam', 'adamw' or 'adafactor', which needs little memory: no b2, eps.
  config.optim.name = 'adam'
  config.optim.lr = 2e-4  # learning rate after warm-up
  config.optim.warmup_steps = 5_000  # steps of a linear rise from 0; 0 = none
  # Decay after warm-up: 'constant', 'cosine' or 'linear'. The rate reaches
  # end_lr at step decay_steps, independent of num_steps, so that a run can be
  # extended. Until step decay_from it is constant; 0 = decay from warm-up on.
  config.optim.decay = 'constant'
  config.optim.decay_from = 0
  config.optim.decay_steps = 0
  config.optim.end_lr = 0.0
  config.optim.clip_norm = 1.0  # bound on the global gradient norm; 0 = none
  config.optim.b1 = 0.9  # decay of the first moment
  config.optim.b2 = 0.999  # decay of the second moment
  config.optim.eps = 1e-8  # added to the root of the second moment
  # For 'adamw': multiplied by the learning rate; not for biases and scales.
  config.optim.weight_decay = 0.0
  # Of the first moment: 'float32' or 'bfloat16', which needs half the memory.
  config.optim.moments_dtype = 'float32'
  # Learning rates for single parts of the network: {'codec': 1e-5}.
  config.optim.part_lr = ConfigDict()

  # Exponential moving average of the parameters, used for sampling. 0 keeps
  # none, and samples with the parameters.
  config.ema = ConfigDict()
  config.ema.decay = 0.9999
  # Further averages, to choose from afterwards (--ema_profile); each takes the
  # memory of the parameters. Other constant decays, such as (0.999, 0.9995):
  config.ema.decays = ()
  # Relative widths of power-function profiles (arXiv 2312.02696). From two,
  # such as (0.05, 0.1), others are reconstructed, see docs/training.md.
  config.ema.profiles = ()

  # Grids of samples drawn during training, see docs/samplers.md.
  config.sample = ConfigDict()
  config.sample.sampler = 'ddim'
  config.sample.grid = 'uniform'  # the grid of times
  config.sample.num_steps = 50
  config.sample.num_images = 64
  # For ancestral sampling: 'fixedlarge' = beta, 'fixedsmall' = the posterior
  # variance, 'learned' = by the network, see loss.variance.
  config.sample.variance = 'fixedlarge'
  config.sample.clip = True  # clip x0 to [-1, 1] in every step
  # Of conditional runs, the weight of classifier-free guidance, for grids and
  # by default for samples: 1 = none, see docs/conditions.md.
  config.sample.guidance = 1.0
  return config


def autoencoder():
  """The keys of config.codec for an autoencoder, see docs/latents.md."""
  config = ConfigDict()
  config.codec = ConfigDict({'name': 'autoencoder'})
  config.codec.channels = 128  # at full resolution
  # Of the channels, one per level; each level but the last is halved.
  config.codec.multipliers = (1, 2, 4)
  config.codec.num_blocks = 2  # residual blocks per level of the encoder
  config.codec.latent_channels = 4
  config.codec.attention = True  # in the middle of encoder and decoder
  config.codec.attention_resolutions = ()  # map sizes with attention, besides
  config.codec.num_groups = 32  # groups of group normalisation
  config.codec.quant_conv = True  # 1x1 convolutions around the latents
  # Blocks of a transformer over all positions, at the end of the encoder.
  config.codec.hybrid = 0
  # 'kl', 'vq' (a codebook), 'fsq' (levels) or 'norm' (for loss.name='dito').
  config.codec.regulariser = 'kl'
  config.codec.codes = 8192  # of vq: the size of the codebook
  config.codec.code_channels = 0  # of vq; 0 = latent_channels
  config.codec.levels = (8, 5, 5, 5)  # of fsq: the levels of each channel
  config.codec.decoder = True  # False for loss.name='dito'
  config.codec.dtype = 'float32'  # or 'bfloat16'
  return config.codec


def autoencoding():
  """The keys of config.loss for an autoencoder, see docs/latents.md."""
  config = ConfigDict()
  config.loss = ConfigDict({'name': 'autoencoding'})
  config.loss.l1 = 1.0  # weight of the absolute error
  config.loss.l2 = 0.0  # weight of the squared error
  config.loss.ssim = 0.1  # weight of 1 - SSIM
  # Weight of LPIPS, a perceptual distance (arXiv 1801.03924), and the file of
  # its weights, which is never downloaded, see docs/latents.md.
  config.loss.lpips = 0.0
  config.loss.lpips_path = ''
  config.loss.lpips_sha256 = ''  # of that file; set when a run begins
  config.loss.kl = 1e-6  # of codec.regulariser='kl': weight of the KL term
  # Of 'vq': the weight of the latents' distance to their codes, the decay of
  # the codebook's averages, and the share of the mean count below which a code
  # is dead and replaced; 0 = never.
  config.loss.commitment = 0.25
  config.loss.decay = 0.99
  config.loss.revive = 0.03
  # The patch critic (a discriminator): its weight relative to the other terms,
  # 0 = none; the step from which the autoencoder is trained by it; channels and
  # halvings. Its learning rate is optim.part_lr.critic.
  config.loss.critic_weight = 0.5
  config.loss.critic_start = 0
  config.loss.critic_channels = 64
  config.loss.critic_strides = 3
  return config.loss


def dito():
  """The keys of config.loss for a diffusion autoencoder (DiTo)."""
  loss = ConfigDict({**get_config().loss, 'name': 'dito', 'prediction': 'flow'})
  # Steps of the decoder.
  loss.decode_steps = 50
  # Noise synchronisation: the share of images whose latents are noised in
  # training, for smoother latents; 0.1 as published. See docs/latents.md.
  loss.synchronise = 0.0
  return loss


def latents():
  """The keys of config.codec for diffusion in latents, see docs/latents.md."""
  config = ConfigDict()
  config.codec = ConfigDict({'name': 'latents'})
  # The folder of an autoencoder's run, or of a run in its latents, whose scale
  # is then taken, too; or of an AutoencoderKL or VQModel of diffusers, or of a
  # pipeline with one. The run copies it when it begins.
  config.codec.path = ''
  config.codec.step = 0  # the checkpoint; 0 = the newest
  # Latents are (z - shift) / scale. 0 = as imported weights say, otherwise the
  # mean and deviation of each channel, measured on the training images.
  config.codec.scale = 0.0
  config.codec.shift = 0.0  # used if the scale is given
  config.codec.cache = ''  # a folder of diffusion_jax.encode; '' = none
  config.codec.decode_rows = 4  # samples that a device decodes at once
  # The autoencoder's structure; set when a run begins.
  config.codec.coder = ConfigDict()
  # Of an autoencoder with loss.name='dito' its denoising network; likewise.
  config.codec.decoding = ConfigDict()
  return config.codec


def text():
  """The keys of config.conditioning for captions, see docs/text.md."""
  config = ConfigDict()
  config.conditioning = ConfigDict({'name': 'text'})
  # '' trains a small tokenizer on the run's captions. Or a folder with
  # merges.txt or tokenizer.json, or another run with captions.
  config.conditioning.tokenizer = ''
  config.conditioning.vocabulary = 2048  # the most ids of tokens
  # Tokens of a caption, with start and end; longer ones are cut. 0 = as many as
  # the longest caption has, or as the tokenizer's folder says.
  config.conditioning.length = 0
  # The transformer that encodes captions, trained with the network.
  config.conditioning.width = 256  # of the tokens
  config.conditioning.num_layers = 4
  config.conditioning.num_heads = 4
  # Whether the network is also told the caption as one vector, with the time.
  config.conditioning.pooled = False
  # The probability with which training drops the caption of an image, so that
  # the network can also sample without one and be guided.
  config.conditioning.drop = 0.1
  # The tokenizer's special tokens and its hash; set when a run begins.
  config.conditioning.ids = ConfigDict()
  config.conditioning.sha256 = ''
  return config.conditioning


def contrastive():
  """The keys of config.loss for a pair of encoders, see docs/text.md."""
  config = ConfigDict()
  config.loss = ConfigDict({'name': 'contrastive'})
  config.loss.embedding = 128  # dimensions of the space of both encoders
  config.loss.temperature = 0.07  # at first; it is learned
  config.loss.coldest = 0.01  # the lowest temperature
  # The encoder of pictures sees means over squares of so many pixels a side.
  config.loss.pool = 1
  # Training pictures are moved by up to so many pixels, scaled by up to this
  # share, and get noise of up to so many levels of 255, at random.
  config.loss.shift = 0.0
  config.loss.scale = 0.0
  config.loss.noise = 0.0
  return config.loss


def frozen_text():
  """The keys of config.conditioning for captions and trained text encoders."""
  config = ConfigDict()
  config.conditioning = ConfigDict({'name': 'frozen_text'})
  # A folder with text_encoder/ and tokenizer/, such as that of Stable
  # Diffusion, or another run with captions. The run copies both when it begins.
  config.conditioning.path = ''
  config.conditioning.drop = 0.1  # as for 'text'
  # What encoders and tokenizers are like; set when a run begins.
  config.conditioning.encoders = ConfigDict()
  config.conditioning.ids = ConfigDict()
  config.conditioning.masked = False  # whether the padding is hidden
  config.conditioning.zeros = False  # whether no caption is zeros (SDXL)
  # Features of the sizes of images, which SDXL's network is told; 0 = none.
  config.conditioning.size_features = 0
  config.conditioning.cache = ''  # a folder of encode --captions; '' = none
  # Further channels of the network that inpaints: a mask and latents; 0 = none.
  config.conditioning.channels = 0
  config.conditioning.sha256 = ''
  return config.conditioning


# Group -> name -> a function that gives the keys of that choice. A name that is
# not here has the keys in `get_config`.
CHOICES = {
  'codec': {'autoencoder': autoencoder, 'latents': latents},
  'conditioning': {'text': text, 'frozen_text': frozen_text},
  'loss': {
    'autoencoding': autoencoding,
    'dito': dito,
    'contrastive': contrastive,
  },
}
