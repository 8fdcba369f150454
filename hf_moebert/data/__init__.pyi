from .splits import load_splits as load_splits
from .tags import encode_tokens as encode_tokens
from .tags import tag_names_of as tag_names_of
from .texts import encode_text as encode_text
from .texts import label_names_of as label_names_of
