"""Text to ids and back, by bytes and by tokenizers of transformers."""

import numpy as np
import pytest
import torch

from flamingo import ByteTokenizer, Flamingo, FlamingoConfig, PretrainedTokenizer, Processor

IMAGE, EOC, PAD, BOS, EOS = range(256, 261)


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


@pytest.fixture(params=["bpe", "unigram"])
def pretrained(request):
    """Small tokenizers of two kinds, made here: one that frames what it is asked to encode by special tokens
    of its own, and one that has no beginning and no padding."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = ["a cat and a dog on a mat", "Output: two dogs", "Question: what is it? Answer: a café"]
    if request.param == "bpe":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet
        )
        frame = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    else:
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["</s>", "<unk>"], unk_token="<unk>")
        frame = {"eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer.train_from_iterator(texts, trainer)
    if request.param == "bpe":
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", None, [("<s>", 0), ("</s>", 1)]
        )
    return PretrainedTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **frame))


class TestPretrainedTokenizer:
    image = np.zeros((4, 4, 3), dtype=np.uint8)

    def test_round_trip(self, pretrained):
        ids = pretrained.encode("a cat<image>two dogs<EOC>")
        assert ids.count(pretrained.image_id) == ids.count(pretrained.eoc_id) == 1
        assert max(ids) < pretrained.vocab_size
        assert not {pretrained.bos_id, pretrained.eos_id, pretrained.pad_id} & set(ids)
        assert pretrained.decode(ids).replace(" ", "") == "acat<image>twodogs<EOC>"
        assert pretrained.encode("") == []
        frame = [pretrained.bos_id, *pretrained.encode("a cat"), pretrained.eos_id, pretrained.pad_id]
        assert pretrained.decode(torch.tensor(frame)).strip() == "a cat"

    def test_frames_by_what_there_is(self, pretrained):
        named = pretrained.tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<pad>"])
        ids = [pretrained.bos_id, pretrained.eos_id, pretrained.pad_id]
        assert ids == (named if pretrained.tokenizer.bos_token else [named[1]] * 3)

    def test_the_papers_layout(self, pretrained):
        processor = Processor(image_size=32, tokenizer=pretrained)
        documents = [["a cat", self.image, "a dog", self.image], [self.image]]
        p, eoc, image = pretrained, [pretrained.eoc_id], [pretrained.image_id]
        first, second = p.encode("a cat"), p.encode("a dog")
        long = [p.bos_id, *first, *eoc, *image, *second, *eoc, *image, *eoc, p.eos_id]
        short = [p.bos_id, *image, *eoc, p.eos_id]
        batch = processor(documents)
        assert batch.input_ids[0].tolist() == long
        assert batch.input_ids[1].tolist() == short + [p.pad_id] * (len(long) - len(short))
        # Padding may be the end of text, which is learned all the same.
        assert batch.attention_mask.sum(dim=1).tolist() == [len(long), len(short)]
        assert batch.labels[1, 1:].tolist() == [-100, *eoc, p.eos_id] + [-100] * (len(long) - len(short))
        open_end = processor(documents, prompt=True)
        assert open_end.input_ids[0].tolist() == long[:-2]

    def test_a_model_of_its_size(self, pretrained):
        processor = Processor(image_size=32, tokenizer=pretrained)
        sizes = {"vocab_size": pretrained.vocab_size, "media_token_id": pretrained.image_id}
        model = Flamingo(FlamingoConfig.preset("tiny", **sizes))
        batch = processor([["a cat", self.image, "a dog"]])
        assert model(batch.input_ids, batch.pixels, labels=batch.labels).loss.isfinite()

    def test_needs_an_end_of_text(self, pretrained):
        pretrained.tokenizer.eos_token = None
        with pytest.raises(ValueError, match=r"with an end of text, got .* without\. Set its eos_token"):
            PretrainedTokenizer(pretrained.tokenizer)
