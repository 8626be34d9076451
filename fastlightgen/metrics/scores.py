"""The scores of an evaluation, as a report shows them: title, format, goal and meaning of each."""

SCORES = {  # key: (title, format, goal, meaning)
    "adherence": ("Adherence", "{:.1%}", "high", "share of the caption's statements that the clip fulfils"),
    "tracking_error": ("Tracking error", "{:.2f} px", "low", "distance of the path to the nearest one that fits"),
    "motion": ("Motion", "{:.2f}", "one", "path length over the caption's; below 1: too slow, 0: frozen"),
    "first_frame_psnr": ("First frame", "{:.1f} dB", "high", "PSNR to the first frame, if one is given"),
    "frechet": ("Fréchet distance", "{:.2f}", "low", "distance to real clips, as a set, in measured features"),
    "temporal_flickering": ("Temporal flickering", "{:.4f}", "real", "VBench score: 1 for a still, lower: more change"),
    "motion_smoothness": ("Motion smoothness", "{:.4f}", "real", "how well neighbours predict a frame; 1 for a still"),
    "saturation": ("Saturation", "{:.3f}", "real", "mean strength of colours; too long a Stage III raises it"),
    "sharpness": ("Sharpness", "{:.0f}", "real", "variance of the Laplacian; blur lowers it, noise raises it"),
}
GOALS = {"high": "higher is better", "low": "lower is better", "one": "best near 1", "real": "best near the real clips"}
