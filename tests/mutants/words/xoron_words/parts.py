"""The text components of xoron-llm, written out as far as faults are put into them."""

from xoron_llm.backbone import XoronMoeBackbone
from xoron_llm.fusion import CrossAttentionFusion
from xoron_llm.tokenizers.byte import ByteTokenizer


class WordsBackbone(XoronMoeBackbone):
    honours_documents = True

    def forward(self, embeddings, *, attention_mask=None, document_ids=None, cache=None, **options):
        output = super().forward(
            embeddings,
            attention_mask=attention_mask,
            document_ids=document_ids,
            cache=cache,
            **options,
        )
        return output  # noqa: RET504

    def logits(self, hidden):
        return super().logits(hidden)

    def resize_rows(self, rows, new_rows, generator):
        super().resize_rows(rows, new_rows, generator)

    def loss_counts(self, batch):
        return super().loss_counts(batch)


class WordsTokenizer(ByteTokenizer):
    def text_base(self):
        base = super().text_base()
        return base  # noqa: RET504

    def base(self):
        tokenizer = super().base()
        return tokenizer  # noqa: RET504


class WordsFusion(CrossAttentionFusion):
    def forward(self, hidden, memory, *, visible, layer):
        return super().forward(hidden, memory, visible=visible, layer=layer)
