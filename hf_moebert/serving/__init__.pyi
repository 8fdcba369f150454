from .app import AnswerOptions as AnswerOptions, Predictor as Predictor, build_app as build_app
from .batching import DynamicBatcher as DynamicBatcher
from .limits import ServingLimits as ServingLimits
from .loading import load_predictor as load_predictor
from .server import run_server as run_server
