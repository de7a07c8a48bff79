"""Documents to tensors, and every way in which a document can be wrong."""

import numpy as np
import pytest
import torch

from flamingo import ByteTokenizer, Flamingo, FlamingoConfig, Processor

IMAGE, EOC, PAD, BOS, EOS = range(256, 261)


@pytest.fixture
def processor():
    return Processor(image_size=32)


def text(string):
    return list(string.encode())


class TestByteTokenizer:
    @pytest.mark.parametrize(
        "string", ["", "plain", "naïve ☕ 日本", "a<image>b<EOC>", "<image><image>", "<img>"]
    )
    def test_round_trip(self, string):
        tokenizer = ByteTokenizer()
        assert tokenizer.decode(tokenizer.encode(string)) == string

    def test_special_tokens(self):
        tokenizer = ByteTokenizer()
        assert tokenizer.encode("a<image><EOC>") == [97, IMAGE, EOC]
        assert tokenizer.decode([BOS, 97, EOS, PAD, PAD]) == "a"
        assert tokenizer.vocab_size == 261

    def test_text_cannot_spell_the_frame(self):
        assert max(ByteTokenizer().encode("<BOS><EOS><PAD>")) < 256

    def test_broken_bytes_are_replaced(self):
        assert ByteTokenizer().decode(torch.tensor([0xE6, 97])) == "\ufffda"


class TestTokens:
    image = np.zeros((4, 4, 3), dtype=np.uint8)

    def test_the_papers_layout(self, processor):
        batch = processor([["hi", self.image, "a", self.image, self.image]])
        ids = [BOS, *text("hi"), EOC, IMAGE, *text("a"), EOC, IMAGE, EOC, IMAGE, EOC, EOS]
        assert batch.input_ids.tolist() == [ids]
        assert batch.num_media.tolist() == [3]

    def test_no_end_of_chunk_is_doubled(self, processor):
        batch = processor([[self.image, "a<EOC>", self.image, "b<EOC>"]])
        assert batch.input_ids.tolist() == [[BOS, IMAGE, 97, EOC, IMAGE, 98, EOC, EOS]]

    def test_both_forms_of_a_document_agree(self, processor):
        first, second = self.image, self.image + 255
        lists = processor([["a", first, "b", second]])
        pairs = processor([("a<image>b<image>", [first, second])])
        assert torch.equal(lists.input_ids, pairs.input_ids)
        assert torch.equal(lists.pixels, pairs.pixels)

    def test_training_pads_on_the_right(self, processor):
        batch = processor([["abc"], [self.image]])
        assert batch.input_ids.tolist() == [[BOS, 97, 98, 99, EOC, EOS], [BOS, IMAGE, EOC, EOS, PAD, PAD]]
        assert torch.equal(batch.attention_mask, batch.input_ids != PAD)

    def test_a_prompt_is_open_and_pads_on_the_left(self, processor):
        batch = processor([["abc"], [self.image]], prompt=True)
        assert batch.input_ids.tolist() == [[BOS, 97, 98, 99], [PAD, PAD, BOS, IMAGE]]
        assert torch.equal(batch.attention_mask, batch.input_ids != PAD)

    def test_no_documents(self, processor):
        batch = processor([])
        assert batch.input_ids.shape == (0, 0)
        assert batch.pixels.shape == (0, 0, 1, 3, 32, 32)


class TestPixels:
    def normalised(self, processor, value):
        return (torch.tensor(value)[:, None, None] - processor.mean) / processor.std

    @pytest.mark.parametrize(
        ("height", "width"), [(20, 40), (40, 20), (5, 10), (640, 320), (32, 32), (1, 99)]
    )
    def test_proportions_are_kept_and_the_rest_is_the_mean(self, processor, height, width):
        image = torch.ones(3, height, width)
        pixels = processor([[image]]).pixels[0, 0, 0]
        filled = (pixels != 0).all(dim=0)
        rows, columns = filled.any(dim=1).sum().item(), filled.any(dim=0).sum().item()
        longest = max(height, width)
        assert (rows, columns) == (max(1, round(32 * height / longest)), max(1, round(32 * width / longest)))
        expected = self.normalised(processor, [1.0, 1.0, 1.0]).expand_as(pixels)
        torch.testing.assert_close(pixels[:, filled], expected[:, filled])
        assert (pixels[:, ~filled] == 0).all()
        top, left = filled.any(dim=1).nonzero()[0].item(), filled.any(dim=0).nonzero()[0].item()
        assert (top, left) == ((32 - rows) // 2, (32 - columns) // 2)

    def test_every_kind_of_image_is_the_same_image(self, processor):
        array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        kinds = [array, array[:, ::-1][:, ::-1], array / 255, tensor, tensor.float() / 255]
        expected = (tensor.float() / 255 - processor.mean) / processor.std
        for kind in kinds:
            torch.testing.assert_close(processor([[kind]]).pixels[0, 0, 0], expected)

    def test_grey_images(self, processor):
        grey = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
        colour = processor([[np.stack([grey] * 3, axis=-1)]]).pixels
        assert torch.equal(processor([[grey]]).pixels, colour)
        assert torch.equal(processor([[torch.from_numpy(grey)[None]]]).pixels, colour)

    @pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
    def test_pillow(self, processor, mode):
        image = pytest.importorskip("PIL.Image").linear_gradient("L").convert(mode)
        array = np.asarray(image.convert("RGB"))
        assert torch.equal(processor([[image]]).pixels, processor([[array]]).pixels)

    def test_clips(self, processor):
        frames = [torch.full((3, 8, 8), i / 4) for i in range(4)]
        one = processor([["a", frames]])
        assert one.pixels.shape == (1, 1, 4, 3, 32, 32)
        assert one.num_frames is None
        for clip in (tuple(frames), torch.stack(frames), torch.stack(frames).permute(0, 2, 3, 1).numpy()):
            assert torch.equal(processor([["a", clip]]).pixels, one.pixels)

    def test_ragged_media_and_frames_are_padded(self, processor):
        image = torch.ones(3, 8, 8)
        batch = processor([[image, [image] * 3], ["text"], [image]])
        assert batch.pixels.shape == (3, 2, 3, 3, 32, 32)
        assert batch.num_media.tolist() == [2, 0, 1]
        assert batch.num_frames[0].tolist() == [1, 3]
        assert batch.num_frames[2, 0] == 1
        filled = (batch.pixels != 0).flatten(3).all(dim=-1)
        assert filled.tolist() == [
            [[True, False, False], [True, True, True]],
            [[False] * 3] * 2,
            [[True, False, False], [False] * 3],
        ]

    def test_moves_to_another_device(self, processor):
        image = torch.ones(3, 8, 8)
        for documents in ([["a", image]], [[image, [image] * 2]]):
            batch = processor(documents)
            moved = batch.to("meta")
            shapes = [None if x is None else x.shape for x in batch]
            assert [None if x is None else x.shape for x in moved] == shapes
            assert all(x is None or x.device.type == "meta" for x in moved)


class TestErrors:
    image = torch.zeros(3, 4, 4)

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            (("<image> <image>", [image]), "document 1, got 1 images and 2 <image> tokens"),
            (("<image>", [image, image]), "document 1, got 2 images and 1 <image> tokens"),
            (("no image", [image]), "got 1 images and 0 <image> tokens"),
            (["an <image> in words", image], "expected no <image> in the texts of document 1"),
            ([torch.zeros(4, 4)], r"got \(4, 4\)"),
            ([torch.zeros(4, 4, 3)], r"tensor \(1, h, w\) or \(3, h, w\), got \(4, 4, 3\)"),
            ([np.zeros((3, 4, 4))], r"got \(4, 3, 4\) \(channels first\)"),
            ([torch.zeros(3, 0, 4)], r"got \(3, 0, 4\)"),
            ([torch.full((3, 4, 4), 2.0)], "floating image in 0..1, got 2..2"),
            ([torch.full((3, 4, 4), -1.0)], "floating image in 0..1, got -1..-1"),
            ([torch.full((3, 4, 4), torch.nan)], "floating image in 0..1, got nan..nan"),
            ([[]], "a clip of one frame or more, got an empty list"),
        ],
    )
    def test_values(self, processor, document, message):
        with pytest.raises(ValueError, match=message):
            processor([["fine"], document])

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ("text", "expected document 1 to be a list of texts and images, got str"),
            (image, "expected document 1 to be a list of texts and images, got Tensor"),
            (("text", image), r"a tuple \(text, list of images\), got a tuple of str, Tensor"),
            (("<image>", ["text"]), "expected only images in the second half of document 1, got a text"),
            ([3], "expected a text, a PIL image, an array, a tensor or a list of these, got int"),
            ([torch.zeros(3, 4, 4, dtype=torch.int64)], "uint8 or a floating type, got torch.int64"),
        ],
    )
    def test_types(self, processor, document, message):
        with pytest.raises(TypeError, match=message):
            processor([["fine"], document])

    def test_one_text_is_not_a_batch(self, processor):
        with pytest.raises(TypeError, match="expected a list of documents"):
            processor("text")


def test_a_document_goes_through_a_model(processor):
    model = Flamingo(FlamingoConfig.preset("tiny"))
    image = torch.rand(3, 20, 30)
    batch = processor([["a photo:", image, " a dog"], [[image] * 3, "a clip"]])
    labels = batch.input_ids.masked_fill(~batch.attention_mask, -100)
    out = model(batch.input_ids, batch.pixels, batch.attention_mask, labels, batch.num_frames)
    assert out.loss.isfinite()
    prompt = processor([["a photo:", image], [[image] * 3, "a"]], prompt=True)
    new = model.generate(
        prompt.input_ids, prompt.pixels, prompt.attention_mask, prompt.num_frames, max_new_tokens=2
    )
    assert new.shape == (2, 2)
