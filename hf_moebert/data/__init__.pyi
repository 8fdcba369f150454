from .splits import load_splits as load_splits, read_file as read_file
from .tags import encode_tokens as encode_tokens, tag_names_of as tag_names_of
from .texts import encode_text as encode_text, label_names_of as label_names_of
