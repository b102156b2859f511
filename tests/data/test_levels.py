import torch

from data.levels import common_gain, gain_to, rms


def test_levels_do_not_depend_on_the_number_of_threads():
    """Torch adds up the squares of a long signal in as many parts as there are threads."""
    signals = torch.randn(20, 64000, generator=torch.Generator().manual_seed(0))
    before, levels = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        levels.append(torch.stack([rms(signal) for signal in signals]))
    torch.set_num_threads(before)
    assert torch.equal(*levels)
    torch.testing.assert_close(levels[0], signals.square().mean(-1).sqrt())


def test_gain_to_reaches_a_level_and_leaves_silence_silent():
    signals = torch.stack([torch.randn(4000), torch.full((4000,), 1e-8)])
    gains = gain_to(torch.tensor([0.1, 0.1]), signals)
    torch.testing.assert_close(rms(signals * gains[:, None]), torch.tensor([0.1, 0.0]))


def test_common_gain_reaches_a_level_or_full_scale():
    noise = torch.randn(4000)
    assert abs(20 * torch.log10(rms(noise * common_gain(noise, level_db=-25.0))) + 25) < 1e-3
    assert 0.9999 < (noise * common_gain(noise, level_db=0.0)).abs().max() <= 1
    assert common_gain(torch.zeros(10), level_db=-25.0) == 1
