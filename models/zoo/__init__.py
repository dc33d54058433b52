"""The networks, one family a file. Importing this package registers all of them, with timm too.

import timm, cellops.models.zoo
model = timm.create_model("hqnet_tiny", num_classes=5)
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
