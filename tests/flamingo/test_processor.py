"""Documents to tensors, and every way in which a document can be wrong."""

import numpy as np
import pytest
import torch

from flamingo import ByteTokenizer, Flamingo, FlamingoConfig, Processor
from flamingo.media import Features
from tests.helpers.weights import randomise

IMAGE, EOC, PAD, BOS, EOS = range(256, 261)


@pytest.fixture
def processor():
    return Processor(image_size=32)


def text(string):
    return list(string.encode())


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

    def test_either_side_may_be_asked_for(self, processor):
        documents = [["abc"], [self.image]]
        left = processor(documents, padding_side="left")
        assert left.input_ids.tolist() == [[BOS, 97, 98, 99, EOC, EOS], [PAD, PAD, BOS, IMAGE, EOC, EOS]]
        right = processor(documents, prompt=True, padding_side="right")
        assert right.input_ids.tolist() == [[BOS, 97, 98, 99], [BOS, IMAGE, PAD, PAD]]
        for batch in (left, right):
            assert torch.equal(batch.attention_mask, batch.input_ids != PAD)
            assert torch.equal(batch.media_starts, batch.input_ids == IMAGE)
        with pytest.raises(ValueError, match="padding_side 'left' or 'right', got 'top'"):
            processor(documents, padding_side="top")

    def test_no_documents(self, processor):
        batch = processor([])
        assert batch.input_ids.shape == (0, 0)
        assert batch.pixels.shape == (0, 0, 1, 3, 32, 32)


class TestLabels:
    image = np.zeros((4, 4, 3), dtype=np.uint8)

    @pytest.mark.parametrize("padding_side", ["left", "right"])
    def test_all_but_images_the_first_token_and_padding(self, processor, padding_side):
        batch = processor([["hi", self.image, "a"], [self.image]], padding_side=padding_side)
        first = torch.zeros_like(batch.attention_mask)
        for row, mask in enumerate(batch.attention_mask):
            first[row, mask.long().argmax()] = True
        silent = first | ~batch.attention_mask | (batch.input_ids == IMAGE)
        assert torch.equal(batch.labels, batch.input_ids.masked_fill(silent, -100))
        assert batch.labels[1][batch.labels[1] != -100].tolist() == [EOC, EOS]

    def test_the_loss_is_that_of_the_document_alone(self, processor):
        model = Flamingo(FlamingoConfig.preset("tiny"))
        documents = [["hi there", self.image, "a"], [self.image, "b"]]
        each = [processor([document]) for document in documents]
        counts = [(one.labels[:, 1:] != -100).sum() for one in each]
        losses = [model(one.input_ids, one.pixels, labels=one.labels).loss for one in each]
        expected = (losses[0] * counts[0] + losses[1] * counts[1]) / sum(counts)
        for padding_side in ("left", "right"):
            batch = processor(documents, padding_side=padding_side)
            loss = model(batch.input_ids, batch.pixels, batch.attention_mask, batch.labels).loss
            torch.testing.assert_close(loss, expected)


class TestSpans:
    image = np.zeros((4, 4, 3), dtype=np.uint8)

    @pytest.mark.parametrize("padding_side", ["left", "right"])
    @pytest.mark.parametrize("p_next", [0.0, 1.0])
    def test_are_the_tokens_that_see_a_medium(self, processor, padding_side, p_next):
        documents = [
            ["hi", self.image, "a", self.image, self.image],
            ["text"],
            ["b", self.image, "long text"],
        ]
        batch = processor(documents, padding_side=padding_side, p_next=p_next)
        assert batch.spans.shape == (3, 3, 2)
        times = batch.media_starts.cumsum(dim=1) * batch.attention_mask
        for row, spans in zip(times.tolist(), batch.spans.tolist(), strict=True):
            for medium, (start, end) in enumerate(spans, 1):
                places = [place for place, time in enumerate(row) if time == medium]
                assert places == list(range(start, end))
        assert batch.spans[1].tolist() == [[0, 0]] * 3
        assert batch.spans[2, 1:].tolist() == [[0, 0]] * 2

    def test_by_hand(self, processor):
        batch = processor([["hi", self.image, "a", self.image], [self.image]], prompt=True)
        # <BOS> h i <EOC> <image> a <EOC> <image>; six of padding, <BOS> <image>
        assert batch.spans.tolist() == [[[4, 7], [7, 8]], [[7, 8], [0, 0]]]

    def test_empty(self, processor):
        assert processor([]).spans.shape == (0, 0, 2)
        assert processor([["text"]]).spans.shape == (1, 0, 2)


class TestPlacement:
    """`p_next`: which image a token sees."""

    image = np.zeros((4, 4, 3), dtype=np.uint8)
    document = ["a", image, "b", image, image, "c"]
    #       <BOS> a <EOC> <image> b <EOC> <image> <EOC> <image> c <EOC> <EOS>
    last = [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3]
    next = [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3]

    @pytest.mark.parametrize(("p_next", "times"), [(0.0, last), (1.0, next)])
    def test_text_sees_the_last_or_the_next(self, processor, p_next, times):
        batch = processor([self.document], p_next=p_next)
        assert batch.media_starts.cumsum(dim=1).tolist() == [times]
        left = processor([self.document, ["much longer than that"]], p_next=p_next, padding_side="left")
        assert (left.media_starts.cumsum(dim=1) * left.attention_mask)[0, -12:].tolist() == times
        assert not left.media_starts[1].any()

    def test_is_drawn_for_each_document(self, processor):
        documents = [self.document] * 400
        batch = processor(documents, p_next=0.5, generator=torch.Generator().manual_seed(0))
        fired = batch.media_starts[:, 0]
        for row, times in ((fired, self.next), (~fired, self.last)):
            assert (batch.media_starts[row].cumsum(dim=1) == torch.tensor(times)).all()
        assert 160 < fired.sum() < 240  # four standard deviations
        each = processor([self.document] * 3, p_next=[0.0, 1.0, 0.0]).media_starts
        assert each[:, 0].tolist() == [False, True, False]
        again = processor(documents, p_next=0.5, generator=torch.Generator().manual_seed(0))
        assert torch.equal(again.media_starts, batch.media_starts)

    def test_reaches_the_blocks_of_a_model(self, processor, seed):
        # One block in front of the last layer: a token's logits depend on the image that it sees alone.
        model = randomise(Flamingo(FlamingoConfig.preset("tiny", cross_attn_first=3)), std=0.2).double()
        for p_next, times in ((0.0, self.last), (1.0, self.next)):
            batch = processor([self.document], p_next=p_next)
            pixels = torch.randn_like(batch.pixels, dtype=torch.float64)
            options = {"media_starts": batch.media_starts}
            block, seen = model.cross_attn["3"], []
            hook = block.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
            model(batch.input_ids, pixels, **options)
            for medium in range(3):
                other = pixels.clone()
                other[:, medium] += 1
                model(batch.input_ids, other, **options)
                changed = (seen[0] != seen[-1]).any(dim=-1)
                assert changed.tolist() == [[time == medium + 1 for time in times]]
            hook.remove()

    def test_by_default_a_model_finds_the_images_itself(self, processor, seed):
        model = randomise(Flamingo(FlamingoConfig.preset("tiny")), std=0.2)
        batch = processor([self.document])
        logits = model(batch.input_ids, batch.pixels).logits
        given = model(batch.input_ids, batch.pixels, media_starts=batch.media_starts).logits
        assert torch.equal(logits, given)
        moved = processor([self.document], p_next=1.0).media_starts
        assert not torch.allclose(model(batch.input_ids, batch.pixels, media_starts=moved).logits, logits)


class TestManyMedia:
    def images(self, count):
        return [np.full((4, 4, 3), shade, dtype=np.uint8) for shade in range(0, 20 * count, 20)]

    def test_the_first_are_kept(self, tmp_path):
        first, second, third, fourth = self.images(4)
        kept = Processor(32)([["a", first, "b", second, "c", "d"]])
        batch = Processor(32, max_media=2)([["a", first, "b", second, "c", third, fourth, "d"]])
        for found, expected in zip(batch[:4], kept[:4], strict=True):
            assert torch.equal(found, expected)
        # What is dropped is not read.
        batch = Processor(32, max_media=2)([["a", first, "b", second, "c", tmp_path / "none.png", "d"]])
        assert torch.equal(batch.pixels, kept.pixels)

    def test_as_many_as_there_may_be(self):
        images = self.images(2)
        for most in (None, 2, 5):
            assert Processor(32, max_media=most)([images]).num_media.tolist() == [2]
        assert Processor(32, max_media=0)([images]).input_ids.tolist() == [[BOS, EOC, EOS]]

    def test_a_window_takes_its_own_media(self):
        images = self.images(9)
        document = [part for number, image in enumerate(images) for part in (image, str(number) * 5)]
        processor = Processor(4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), max_media=2)
        whole = Processor(4)([document]).input_ids[0].tolist()
        generator, starts = torch.Generator().manual_seed(0), set()
        for _ in range(60):
            batch = processor([document], window=20, generator=generator)
            ids, count = batch.input_ids[0].tolist(), batch.num_media.item()
            assert ids.count(IMAGE) == count
            places = [p for p in range(len(whole) - 19) if self.first_two(whole[p : p + 20]) == ids]
            assert len(places) == 1
            starts.add(places[0])
            first = whole[: places[0]].count(IMAGE)
            shades = (batch.pixels[0, :, 0, 0, 0, 0] * 255).round().long().tolist()
            assert shades == [20 * number for number in range(first, first + count)]
            assert batch.labels[0, 0] == -100
        assert len(starts) > 20

    def test_a_window_begins_anywhere_and_ends_at_the_last_token(self):
        processor, whole = Processor(4), [BOS, 97, EOC, EOS]
        for length in (3, 4):
            generator = torch.Generator().manual_seed(0)
            windows = processor([["a"]] * 40, window=length, generator=generator).input_ids.tolist()
            places = range(len(whole) - length + 1)
            assert {tuple(window) for window in windows} == {tuple(whole[p : p + length]) for p in places}

    def test_the_generator_is_asked_for_what_is_random_alone(self):
        image = self.images(1)[0]

        def drawn(document, **options):
            """How many numbers, and none of torch's own generator."""
            generator, own = torch.Generator().manual_seed(0), torch.get_rng_state()
            Processor(4)([document], generator=generator, **options)
            assert torch.equal(torch.get_rng_state(), own)
            other, count = torch.Generator().manual_seed(0), 0
            while not torch.equal(generator.get_state(), other.get_state()):
                torch.rand((), generator=other)
                count += 1
            return count

        document = ["a", image]  # <BOS> a <EOC> <image> <EOC> <EOS>
        assert drawn(document) == drawn(document, window=6) == 0
        assert drawn(document, window=5) == drawn(document, p_next=0.5) == 1
        assert drawn(document, window=5, p_next=0.5) == 2

    def first_two(self, ids):
        """Without `<EOC><image>` from the third image on."""
        places = [place for place, id in enumerate(ids) if id == IMAGE][2:]
        return [id for place, id in enumerate(ids) if place not in places and place + 1 not in places]

    def test_a_short_document_is_its_own_window(self):
        (image,) = self.images(1)
        batch = Processor(32)([["text", image]], window=100)
        assert torch.equal(batch.input_ids, Processor(32)([["text", image]]).input_ids)


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

    @pytest.mark.parametrize(("height", "width"), [(50, 80), (81, 50), (20, 33), (32, 32), (7, 99)])
    def test_cropped_as_clip_does(self, height, width):
        """The shorter side fits, by Pillow's bicubic, and the middle of the longer one is kept."""
        pillow = pytest.importorskip("PIL.Image")
        # Not up to black and white: Pillow clips twice, after rows and after columns.
        array = np.random.default_rng(0).integers(64, 192, (height, width, 3), dtype=np.uint8)
        processor = Processor(32, fit="crop")
        pixels = processor([[array]]).pixels[0, 0, 0]
        shorter = min(height, width)
        size = 32 * width // shorter, 32 * height // shorter
        left, top = (round((side - 32) / 2) for side in size)
        resized = pillow.fromarray(array).resize(size, pillow.Resampling.BICUBIC)
        expected = np.asarray(resized)[top : top + 32, left : left + 32] / 255
        found = (pixels * processor.std + processor.mean).permute(1, 2, 0)
        assert found.shape == (32, 32, 3)
        assert abs(found.numpy() - expected).max() < 1.5 / 255

    def test_every_kind_of_image_is_the_same_image(self, processor):
        array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        kinds = [array, array[:, ::-1][:, ::-1], array / 255, tensor, tensor.float() / 255]
        expected = (tensor.float() / 255 - processor.mean) / processor.std
        for kind in kinds:
            torch.testing.assert_close(processor([[kind]]).pixels[0, 0, 0], expected)

    def test_pixels_are_float32_numbers_alone(self, processor):
        image = torch.rand(3, 20, 30).half()
        expected = processor([[image.float()]]).pixels
        pixels = processor([[image.requires_grad_()]]).pixels
        assert not pixels.requires_grad
        assert pixels.dtype == torch.float32
        assert torch.equal(pixels, expected)

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

    def test_num_frames_is_none_where_only_the_number_of_media_differs(self, processor):
        image = torch.ones(3, 8, 8)
        assert processor([[image, image], ["text"], [image]]).num_frames is None
        assert processor([[[image] * 2, [image] * 2], [[image] * 2]]).num_frames is None

    def test_a_cropped_image_stays_in_the_range_of_images(self):
        """Bicubic interpolation overshoots at an edge."""
        edge = torch.zeros(3, 8, 8)
        edge[..., 4:] = 1
        processor = Processor(32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), fit="crop")
        pixels = processor([[edge]]).pixels
        assert (pixels.min(), pixels.max()) == (0, 1)

    def test_moves_to_another_device(self, processor):
        image = torch.ones(3, 8, 8)
        for documents in ([["a", image]], [[image, [image] * 2]]):
            batch = processor(documents)
            moved = batch.to("meta")
            shapes = [None if x is None else x.shape for x in batch]
            assert [None if x is None else x.shape for x in moved] == shapes
            assert all(x is None or x.device.type == "meta" for x in moved)


class TestWrittenImage:
    """`<image>` in the words of a page about SVG."""

    @pytest.mark.parametrize(
        "text", ["the <image> element", "<image>", "<image><image>", "<<image>image>", "<EOC><image>"]
    )
    def test_it_is_text(self, processor, text):
        batch = processor([[text, torch.zeros(3, 4, 4), text]])
        ids = batch.input_ids[0].tolist()
        assert ids.count(processor.tokenizer.image_id) == 1
        assert batch.num_media.tolist() == [1]
        assert processor.tokenizer.decode(ids) == f"{text}<EOC><image>{text}<EOC>"

    def test_of_a_tokenizer_that_knows_it_too(self):
        class Words(ByteTokenizer):
            def encode(self, text):
                return [self.image_id] if text == "<image>" else super().encode(text)

        assert Processor(32, tokenizer=Words())([["<image>"]]).num_media.tolist() == [0]

    def test_in_a_pair_of_text_and_media_it_is_an_image(self, processor):
        with pytest.raises(ValueError, match="got 0 images and 1 <image> tokens"):
            processor([("the <image> element", [])])


class TestErrors:
    image = torch.zeros(3, 4, 4)

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            (("<image> <image>", [image]), "document 1, got 1 images and 2 <image> tokens"),
            (("<image>", [image, image]), "document 1, got 2 images and 1 <image> tokens"),
            (("no image", [image]), "got 1 images and 0 <image> tokens"),
            ([torch.zeros(4, 4)], r"got \(4, 4\)"),
            ([torch.zeros(5, 4, 3)], r"tensor \(1, h, w\) or \(3, h, w\), .*, got \(5, 4, 3\)"),
            ([np.zeros((3, 4, 5))], r"got \(5, 3, 4\) \(channels first\)"),
            ([torch.zeros(3, 0, 4)], r"got \(3, 0, 4\)"),
            ([torch.full((3, 4, 4), 2.0)], "floating image in 0..1, got 2..2"),
            ([torch.full((3, 4, 4), -1.0)], "floating image in 0..1, got -1..-1"),
            ([torch.full((3, 4, 4), torch.nan)], "floating image in 0..1, got nan..nan"),
            ([[]], "a clip of one frame or more, got an empty list"),
            ([image, Features(torch.zeros(1, 4, 6))], r"as features of one size, .* \(3, 32, 32\), \(4, 6\)"),
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
            ([3], "expected a text, a PIL image, .* a pathlib.Path or a list of these, got int"),
            ([torch.zeros(3, 4, 4, dtype=torch.int64)], "uint8, .* or a floating type, got torch.int64"),
        ],
    )
    def test_types(self, processor, document, message):
        with pytest.raises(TypeError, match=message):
            processor([["fine"], document])

    def test_another_fit(self):
        with pytest.raises(ValueError, match="expected fit 'pad', 'crop' or 'stretch', got 'fill'"):
            Processor(32, fit="fill")

    def test_another_resample(self):
        with pytest.raises(ValueError, match="expected resample 'bilinear' or 'bicubic', got 'nearest'"):
            Processor(32, resample="nearest")

    @pytest.mark.parametrize("p_next", [[0.5], [0.5] * 3])
    def test_another_number_of_chances_than_documents(self, processor, p_next):
        with pytest.raises(ValueError, match=f"each of the 2 documents, got {len(p_next)}"):
            processor([["a"], ["b"]], p_next=p_next)

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


def test_an_image_and_clips_of_8_and_30_frames_go_through_a_model(processor, seed):
    """Each with the time embeddings of its own length, in whatever batch it is."""
    model = randomise(Flamingo(FlamingoConfig.preset("tiny", max_num_frames=8)), std=0.2).double()
    image, short, long = (list(torch.rand(frames, 3, 8, 8)) for frames in (1, 8, 30))
    documents = [["a", image[0], "one", short, "two", long, "three"], [long, "alone", short, "b"]]

    def logits(some):
        batch = processor(some)
        pixels = batch.pixels.double()
        out = model(batch.input_ids, pixels, batch.attention_mask, num_frames=batch.num_frames).logits
        return [row[mask] for row, mask in zip(out, batch.attention_mask, strict=True)]

    together = logits(documents)
    for document, expected in zip(documents, together, strict=True):
        torch.testing.assert_close(logits([document])[0], expected)
        alone = [processor([[part]]).pixels.double() for part in document if not isinstance(part, str)]
        media = torch.cat([model.encode_media(pixels) for pixels in alone], dim=1)
        torch.testing.assert_close(model.decode(processor([document]).input_ids, media)[0], expected)
    (other,) = logits([["a", image[0], "one", short[:7], "two", long, "three"]])
    assert not torch.allclose(other, together[0])
