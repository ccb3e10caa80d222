"""FID's Inception-v3 in torch, block by block as its paper and TensorFlow's graph have it: the independent side.

Names are those of the published `pt_inception-2015-12-05-6726825d.pth`. It gives what torch-fidelity 0.4.0 does with
the same weights; that package needs torchvision, which does not install beside a torch for CPUs alone.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

SMALLEST = 75
"""Height and width with one place left at the end."""


class Unit(nn.Module):
    def __init__(self, cin: int, cout: int, kernel, stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def averaged(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Fives(nn.Module):
    """35 × 35 places."""

    def __init__(self, cin: int, pooled: int):
        super().__init__()
        self.branch1x1 = Unit(cin, 64, 1)
        self.branch5x5_1 = Unit(cin, 48, 1)
        self.branch5x5_2 = Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Unit(cin, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, padding=1)
        self.branch_pool = Unit(cin, pooled, 1)

    def forward(self, x):
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(averaged(x))], 1)


class ToSeventeen(nn.Module):
    def __init__(self, cin: int):
        super().__init__()
        self.branch3x3 = Unit(cin, 384, 3, stride=2)
        self.branch3x3dbl_1 = Unit(cin, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, stride=2)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class Sevens(nn.Module):
    """17 × 17 places."""

    def __init__(self, mid: int):
        super().__init__()
        wide, high = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Unit(768, 192, 1)
        self.branch7x7_1 = Unit(768, mid, 1)
        self.branch7x7_2 = Unit(mid, mid, **wide)
        self.branch7x7_3 = Unit(mid, 192, **high)
        self.branch7x7dbl_1 = Unit(768, mid, 1)
        self.branch7x7dbl_2 = Unit(mid, mid, **high)
        self.branch7x7dbl_3 = Unit(mid, mid, **wide)
        self.branch7x7dbl_4 = Unit(mid, mid, **high)
        self.branch7x7dbl_5 = Unit(mid, 192, **wide)
        self.branch_pool = Unit(768, 192, 1)

    def forward(self, x):
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(averaged(x))], 1)


class ToEight(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch3x3_1 = Unit(768, 192, 1)
        self.branch3x3_2 = Unit(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Unit(768, 192, 1)
        self.branch7x7x3_2 = Unit(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Unit(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Unit(192, 192, 3, stride=2)

    def forward(self, x):
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return torch.cat([three, self.branch7x7x3_4(seven), F.max_pool2d(x, 3, 2)], 1)


class Threes(nn.Module):
    """8 × 8 places; the very last block pools by maxima."""

    def __init__(self, cin: int, maximum: bool):
        super().__init__()
        wide, high = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
        self.maximum = maximum
        self.branch1x1 = Unit(cin, 320, 1)
        self.branch3x3_1 = Unit(cin, 384, 1)
        self.branch3x3_2a = Unit(384, 384, **wide)
        self.branch3x3_2b = Unit(384, 384, **high)
        self.branch3x3dbl_1 = Unit(cin, 448, 1)
        self.branch3x3dbl_2 = Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Unit(384, 384, **wide)
        self.branch3x3dbl_3b = Unit(384, 384, **high)
        self.branch_pool = Unit(cin, 192, 1)

    def forward(self, x):
        three, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.maximum else averaged(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


class TorchInception(nn.Module):
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = Fives(192, 32), Fives(256, 64), Fives(288, 64)
        self.Mixed_6a = ToSeventeen(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (Sevens(mid) for mid in (128, 160, 160, 192))
        self.Mixed_7a = ToEight()
        self.Mixed_7b, self.Mixed_7c = Threes(1280, maximum=False), Threes(2048, maximum=True)
        self.fc = nn.Linear(2048, 1008)  # in the file, of no use to FID

    def forward(self, x):
        """[b, 3, h, w] → [b, 2048]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))


def random_inception(seed: int = 0) -> TorchInception:
    """With every number drawn, so that what is forgotten or swapped shows; features stay of order one."""
    torch.manual_seed(seed)
    model = TorchInception().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.requires_grad_(False)


def published(model: TorchInception, path: Path) -> Path:
    """Writes a state dict as the published file, which is from before torch had a zip format."""
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    return path
