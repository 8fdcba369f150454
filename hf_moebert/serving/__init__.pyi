from .app import Predictor as Predictor
from .app import build_app as build_app
from .app import run_server as run_server
from .batching import DynamicBatcher as DynamicBatcher
from .limits import ServingLimits as ServingLimits
