"""How the pages look: buttons that start and stop, figures as tiles, clips on one clock.

Nothing is fetched from elsewhere: fonts are the reader's, and a Content-Security-Policy (guard.py) refuses the rest.
"""

from __future__ import annotations

import gradio as gr

FONTS = ["ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
THEME = gr.themes.Default(
    primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=MONO, radius_size="md"
).set(
    block_label_background_fill="*background_fill_primary",
    block_shadow="none",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_text_color="white",
)

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
#head h1 { font-size: 1.45rem; margin: 0.3rem 0 0; letter-spacing: -0.01em; }
#head p { color: var(--body-text-color-subdued); margin: 0.1rem 0 0.3rem; }
.pixels img { image-rendering: pixelated; object-fit: contain; }
#pair img, #difference img { width: 100%; }
#difference button, #difference .image-frame { width: 100%; }
:is(#kernels, #layers, #results) :is(td, th, td *, th *) {
  font-family: var(--font) !important; font-size: 0.8rem; }
#worst .thumbnail-item { aspect-ratio: 3 / 1; }
#worst .caption-label { max-width: 100%; }
#worst::before { content: "Worst prompts, worst first: original, quantized, difference x8"; font-size: 0.85rem;
                 padding: 8px 10px; display: block; }
.job .track { height: 8px; border-radius: 4px; background: var(--neutral-200); overflow: hidden; }
.job .done { height: 100%; background: var(--primary-600); transition: width 0.3s; }
.job p { margin: 8px 0 4px; }
.job ul { margin: 4px 0 0 18px; color: var(--body-text-color-subdued); font-size: 0.85rem; }
.job pre { white-space: pre-wrap; font-size: 0.75rem; color: var(--body-text-color-subdued); margin: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 14px;
         --ink: var(--body-text-color); --muted: var(--body-text-color-subdued);
         --line: var(--border-color-primary); --accent: var(--primary-600);
         --surface: var(--background-fill-primary); }
.plots figure { margin: 0; } .plots svg { width: 100%; height: auto; font-family: var(--font); }
#said { font-size: 0.85rem; color: var(--body-text-color-subdued); }
"""

TILES = """
{{#if value.psnr_db}}
<div class="tiles">
  <div class="tile"><b>{{value.psnr_db}} dB</b><span>PSNR to the original</span></div>
  <div class="tile"><b>{{#if value.perceptual.value}}{{value.perceptual.value}}{{else}}0{{/if}}</b>
    <span>{{value.perceptual.name}}</span><i>{{value.perceptual.note}}</i></div>
  <div class="tile"><b>{{value.ms_per_step.[0]}} → {{value.ms_per_step.[1]}}</b>
    <span>ms per step</span><i>{{value.times_as_fast}} times as fast, median of {{value.steps}} steps</i></div>
  <div class="tile"><b>{{value.gib.[0]}} → {{value.gib.[1]}}</b>
    <span>GiB of denoiser weights</span><i>{{value.share}} of full precision</i></div>
  {{#if value.peak_gib}}<div class="tile"><b>{{value.peak_gib.[0]}} → {{value.peak_gib.[1]}}</b>
    <span>peak GiB of the device</span><i>both models are loaded</i></div>{{/if}}
</div>
<p class="what">{{value.model}} · {{value.recipe}} · seed {{value.seed}} · {{value.steps}} steps</p>
{{else}}<p class="what">Figures appear here: PSNR, perceptual distance, time and memory.</p>{{/if}}
"""
TILES_STYLE = """
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 10px; }
.tile { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px 12px;
        background: var(--background-fill-primary); display: flex; flex-direction: column; gap: 2px; }
.tile b { font-size: 0.98rem; font-variant-numeric: tabular-nums; }
.tile span { font-size: 0.82rem; }
.tile i, .what { font-size: 0.76rem; font-style: normal; color: var(--body-text-color-subdued); }
.what { margin: 8px 2px 0; }
"""
CLIPS = """{{#if value.clips}}
<div class="clips">{{#each value.clips}}<figure><img alt="{{this.label}}" data-clip="{{@index}}"/>
<figcaption>{{this.label}}</figcaption></figure>{{/each}}</div>
<div class="clock"><button type="button" class="play">pause</button>
<input type="range" class="at" min="0" value="0" aria-label="frame"/><output class="frame">1</output></div>
{{/if}}"""
CLIPS_STYLE = """
.clips { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 10px; }
figure { margin: 0; } figcaption { text-align: center; font-size: 0.82rem; }
img { width: 100%; image-rendering: pixelated; border-radius: 6px; }
.clock { display: flex; gap: 10px; align-items: center; margin-top: 8px; }
.at { flex: 1; } .play { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 2px 12px; }
"""
CLIPS_SCRIPT = """
let frame = 0, playing = true, last = 0;
const clips = () => (props.value && props.value.clips) || [];
const count = () => Math.min(...clips().map(clip => clip.frames.length));
function show(n) {
  if (!clips().length) return;
  frame = ((n % count()) + count()) % count();
  element.querySelectorAll('img[data-clip]').forEach(img => { img.src = clips()[img.dataset.clip].frames[frame]; });
  const at = element.querySelector('.at');
  if (at) { at.max = count() - 1; at.value = frame; element.querySelector('.frame').value = frame + 1; }
}
function tick(now) {
  if (!element.isConnected) return;
  if (playing && clips().length && now - last > 1000 / props.value.fps) { last = now; show(frame + 1); }
  requestAnimationFrame(tick);
}
element.addEventListener('click', event => {
  if (!event.target.classList.contains('play')) return;
  playing = !playing; event.target.textContent = playing ? 'pause' : 'play';
});
element.addEventListener('input', event => {
  if (!event.target.classList.contains('at')) return;
  playing = false; element.querySelector('.play').textContent = 'play'; show(Number(event.target.value));
});
watch('value', () => { playing = true; show(0); });
show(0); requestAnimationFrame(tick);
"""


def figures(**options) -> gr.HTML:
    """The figures of a comparison: a dict for programs, tiles for people."""
    shown = gr.HTML(html_template=TILES, css_template=TILES_STYLE, label="figures", **options)
    shown.api_info = lambda: {"type": "object", "description": "psnr_db, perceptual, ms_per_step, gib, share, ..."}
    return shown


def player(**options) -> gr.HTML:
    """Clips of equally many frames side by side: {"fps", "clips": [{"label", "frames": [data URIs]}]}.

    One clock draws frame n of every clip at once, so that they cannot drift apart.
    """
    shown = gr.HTML(html_template=CLIPS, css_template=CLIPS_STYLE, js_on_load=CLIPS_SCRIPT, label="clips", **options)
    shown.api_info = lambda: {"type": "object", "description": "fps, and clips of data URIs; null for pictures"}
    return shown


def buttons(what: str, name: str) -> tuple[gr.Button, gr.Button]:
    """The button that starts a tab's work, called `what`, and the one that stops it; ids NAME-go and NAME-stop."""
    with gr.Row():
        go = gr.Button(what, variant="primary", elem_id=f"{name}-go")
        return go, gr.Button("Stop", elem_id=f"{name}-stop", min_width=80)


def number(value: float, label: str, bounds: tuple[float, float], precision: int | None = 0, **options) -> gr.Number:
    """A gr.Number that answers programs in one line when they send no number. precision: None for fractions."""
    least, most = bounds
    shown = gr.Number(value, label=label, minimum=least, maximum=most, precision=precision, min_width=90, **options)
    taken = shown.preprocess

    def preprocess(payload):
        if isinstance(payload, bool) or not isinstance(payload, int | float | None):
            said = f"{shown.label}: got a {type(payload).__name__}, expected a number"
            raise gr.Error(said, print_exception=False)
        return taken(payload)

    shown.preprocess = preprocess
    return shown
