"""The glossary: one word per axis, used alike in types, einops patterns, Results and error messages.

world    one row of the batch. Clean and corrupted runs of the same prompt are two worlds of one pass.
pos      position in the sequence the decoder reads. Left-padded worlds share one `pos` axis.
q, k     query and key positions of an attention map. In cached decoding q counts the new rows, k all rows.
head     attention head; kv_head where keys and values have fewer (grouped-query attention), never repeated.
d_model  width of the residual stream. d_head: width of one head. d_vocab: size of the vocabulary.
layer    decoder layer. 0-based in hook names and code, 1-based in files, the command line and plots.
frame    one sampled video frame, or one tubelet where the vision tower merges consecutive frames.
row, col place of a video token in the grid of its frame, after any pooling or merging.
token    one video token (pos counts everything; token counts only what the vision side made).
patch    one row of the vision tower within its frame, before any pooling or merging (class tokens included).
place    rank of a word among the best, from 1.
option   answer option of a multiple-choice question, 0-based.
window   centre layer of an attention knockout.
metric   what a sweep reads of a run: see lab.edges.metrics. task: the benchmark's task an item belongs to.
key_frame, query_frame   frame that is read, frame that reads, of attention edges. 0-based.
variant  one of the ways to run that a comparison sets side by side, vanilla first. group: tokens that are compared
         together; pair: groups that attention goes between, "keys->queries".
first, last   first and last layer cut, where every range of layers is (1-based).
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

Resid = Float[Tensor, "world pos d_model"]
Heads = Float[Tensor, "world pos head d_head"]
Scores = Float[Tensor, "world head q k"]  # pre-softmax, masked = -inf
Pattern = Float[Tensor, "world head q k"]
Logits = Float[Tensor, "world pos d_vocab"]
Ids = Int[Tensor, "world pos"]
Positions = Int[Tensor, " pos"]
Keep = Bool[Tensor, "#world #head q k"]  # True = this edge may be read
