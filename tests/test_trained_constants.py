"""Step 2 applies PRC with the gamma and the iterations of the training, unless a constant says otherwise."""

import numpy as np
import torch

from models.backbone import Backbone
from models.classifier import Classifier
from tests.steps import TRAIN, experiment, step
from tools.augment import normalise, to_tensor
from tools.labels import load_image
from tools.map_files import fuse_scales, load_maps, relative
from tools.training import load_checkpoint


def test_gamma_and_iterations_come_from_the_training(copy):
    step("train_classification", copy, experiment="loose", gamma=0.02, iterations=2)
    step("infer_classification", copy, experiment="loose", scales=(1.0,))
    step("infer_classification", copy, experiment="once", classifier="loose", scales=(1.0,), iterations=1)

    image = load_image(copy / "datasets" / "tiny" / "train" / "images" / f"{TRAIN[1]}.png")
    x = normalise(to_tensor(image))[None]
    maps = {}
    for gamma, iterations in ((0.02, 2), (0.02, 1), (0.7, 2)):
        model = Classifier(Backbone("resnet18", "none"), 3, gamma, iterations, train_all=False).eval()
        load_checkpoint(experiment(copy, "loose") / "classifier" / "model.pt", model)
        with torch.inference_mode():
            both = model(x)[1].relu() + model(x.flip(-1))[1].relu().flip(-1)
        maps[gamma, iterations] = relative(fuse_scales([both[0].numpy()], (64, 64)))

    for name, expected in (("loose", maps[0.02, 2]), ("once", maps[0.02, 1])):
        classes, cams = load_maps(experiment(copy, name) / "cams" / f"{TRAIN[1]}.npz", 3, (64, 64))
        np.testing.assert_allclose(cams, expected[classes], atol=2e-3)
        for other in maps.values():  # the constants are felt
            assert other is expected or np.abs(cams - other[classes]).max() > 0.02
