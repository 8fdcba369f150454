from .model import TextModel as TextModel, load as load
