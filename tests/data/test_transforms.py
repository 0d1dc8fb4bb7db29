import pytest
import torch
import torch.nn.functional as F

from lightning_dp.data import CropFlip, Normalize, OneOfAffine, Shift
from lightning_dp.errors import ConfigError

IMAGES = torch.randint(0, 256, (40, 3, 8, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
AUGMENTATIONS = [CropFlip(padding=3), CropFlip(padding=2, flip=False), Shift(pixels=2), OneOfAffine()]


def coins(augmentation, num=40):
    return torch.rand(num, augmentation.num_coins, generator=torch.Generator().manual_seed(1))


def padded(images, pad, mode):
    return F.pad(images.double(), (pad, pad, pad, pad), mode=mode)


def test_normalize_uses_each_channels_constants():
    out = Normalize((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))(IMAGES)
    assert out.dtype == torch.float32
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 1.0), (0.3, 2.0)]):
        assert torch.allclose(out[:, channel].double(), (IMAGES[:, channel].double() / 255 - mean) / std, atol=1e-6)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_chunks_give_what_the_whole_batch_gives(augmentation):
    drawn = coins(augmentation)
    whole = augmentation(IMAGES, drawn)
    parts = [augmentation(IMAGES[i : i + 7], drawn[i : i + 7]) for i in range(0, 40, 7)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, IMAGES)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_coins_alone_decide(augmentation):
    before = torch.random.get_rng_state()
    first, again = (augmentation(IMAGES, coins(augmentation)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_type_and_shape_are_kept_also_of_an_empty_batch(augmentation, dtype):
    for num in (40, 0):
        out = augmentation(IMAGES[:num].to(dtype), coins(augmentation, num))
        assert out.dtype == dtype
        assert out.shape == (num, 3, 8, 10)


def test_crop_flip_equals_crops_of_the_reflected_image():
    drawn, pad = coins(AUGMENTATIONS[0]), 3
    out = CropFlip(padding=pad)(IMAGES, drawn)
    frame = padded(IMAGES, pad, "reflect")
    for i in range(40):
        top, left = (int(drawn[i, axis] * (2 * pad + 1)) for axis in (0, 1))
        expected = frame[i, :, top : top + 8, left : left + 10]
        assert torch.equal(out[i].double(), expected.flip(2) if drawn[i, 2] < 0.5 else expected)


def test_shift_equals_crops_of_the_image_with_repeated_border():
    drawn, pad = coins(AUGMENTATIONS[2]), 2
    out = Shift(pixels=pad)(IMAGES, drawn)
    frame = padded(IMAGES, pad, "replicate")
    for i in range(40):
        top, left = (int(drawn[i, axis] * (2 * pad + 1)) for axis in (0, 1))
        assert torch.equal(out[i].double(), frame[i, :, top : top + 8, left : left + 10])


@pytest.mark.parametrize("augmentation", [CropFlip(padding=1, flip=False), Shift(pixels=1)])
def test_all_offsets_are_equally_likely_and_none_is_beyond_the_margin(augmentation):
    spot = torch.zeros(9000, 1, 5, 5)
    spot[:, :, 2, 2] = 1
    places = augmentation(spot, coins(augmentation, 9000)).mean(0)[0]
    assert torch.allclose(places[1:4, 1:4], torch.full((3, 3), 1 / 9), atol=4 * (1 / 9 / 9000) ** 0.5)
    assert places.sum() == pytest.approx(1)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_coin_that_rounds_up_to_one_stays_inside(augmentation):
    out = augmentation(IMAGES[:1], torch.ones(1, augmentation.num_coins))
    below = augmentation(IMAGES[:1], torch.full((1, augmentation.num_coins), 0.9999999))
    assert torch.equal(out, below)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"CropFlip\.padding 8 is too large"):
        CropFlip(padding=8)(IMAGES, torch.rand(40, 3))
    with pytest.raises(ConfigError, match=r"CropFlip.padding is -1"):
        CropFlip(padding=-1)
    with pytest.raises(ConfigError, match=r"Shift.pixels is -1"):
        Shift(pixels=-1)


def test_works_record_by_record_under_vmap():
    augmentation = CropFlip(padding=3)
    drawn = coins(augmentation)
    alone = torch.func.vmap(lambda image, coin: augmentation(image[None], coin[None])[0])(IMAGES.float(), drawn)
    assert torch.equal(alone, augmentation(IMAGES.float(), drawn))


def test_one_of_affine_shifts_zooms_or_turns_by_its_coins():
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 6] = 1.0  # two pixels right of the centre
    change = OneOfAffine(pixels=2, zoom=0.5, degrees=90)

    def place(*coins):
        return divmod(int(change(image, torch.tensor([coins])).argmax()), 9)

    assert place(0.1, 0.5, 0.5) == (4, 6)  # a shift by nothing
    assert place(0.1, 1.0, 0.5) == (4, 4)
    assert place(0.1, 0.5, 0.0) == (6, 6)
    assert place(0.5, 0.0, 0.9) == (4, 8)  # twice as large
    assert place(0.9, 1.0, 0.9) in {(2, 4), (6, 4)}  # a quarter turn
    pixels = (image * 255).to(torch.uint8)
    assert change(pixels, torch.tensor([[0.1, 1.0, 0.5]])).dtype == torch.uint8


def test_one_of_affine_treats_each_image_by_itself_and_can_be_differentiated():
    torch.manual_seed(0)
    images, coins = torch.randn(5, 2, 8, 8, requires_grad=True), torch.rand(5, 3)
    change = OneOfAffine()
    together = change(images, coins)
    for i in range(5):
        torch.testing.assert_close(together[i], change(images[i : i + 1], coins[i : i + 1])[0])
    together.sum().backward()
    assert images.grad.abs().sum() > 0
