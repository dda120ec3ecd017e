import torch

from mipha.assistant import *
from mipha.models.build import save_checkpoint


def test_x(tiny_model, tmp_path):
    a = Assistant(*tiny_model("phi"))
    b = Assistant(*tiny_model("phi"))
    for k, v in a.model.state_dict().items():
        if not torch.equal(v, b.model.state_dict()[k]):
            print("DIFF", k)
    save_checkpoint(b.model, b.processor, tmp_path / "m")
    c = load(tmp_path / "m", device="cpu")
    for k, v in a.model.state_dict().items():
        if not torch.equal(v, c.model.state_dict()[k]):
            print("DIFFc", k, (v - c.model.state_dict()[k]).abs().max())
    im = Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8))
    for x in (a, b, c):
        print(repr(x.answer(im, "Which colour?", max_new_tokens=12)))
