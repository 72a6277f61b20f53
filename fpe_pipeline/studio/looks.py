"""How the page looks: system fonts, two greys, one accent; nothing is fetched from anywhere else."""

from __future__ import annotations

from typing import Any

__all__ = ["CSS", "theme"]

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: 0 auto !important;
  padding: 0 20px 40px !important; }
.gradio-container .main.fillable { padding: 0 !important; max-width: none !important; }
.gradio-container .html-container { padding: 0 !important; }
.gradio-container .tab-container.visually-hidden { overflow: hidden; max-width: 100%; }
.gradio-container .tab-wrapper button { padding-inline: 12px; }
.gradio-container .tab-wrapper button.selected { color: var(--fpe-accent-ink); }
.gradio-container .tab-wrapper button.selected::after { background: var(--fpe-accent); }
.fpe-head { display: flex; align-items: baseline; gap: 14px; padding: 22px 2px 10px; flex-wrap: wrap; }
.fpe-head h1 { font-size: 1.35rem; font-weight: 680; letter-spacing: -.02em; margin: 0; }
.fpe-head p { margin: 0; color: var(--body-text-color-subdued); font-size: .92rem; }
#recipe { position: sticky; top: 12px; align-self: flex-start; gap: 12px; }
#desk { align-items: flex-start; gap: 28px; }
.fpe-label { font-size: .78rem; font-weight: 600; color: var(--body-text-color-subdued); margin: 0 0 4px; }
.fpe-diff ul { list-style: none; margin: 0; padding: 0; }
.fpe-diff li { margin: 0; padding: 7px 11px; border-left: 3px solid var(--border-color-primary); font-size: .93rem;
  line-height: 1.45; overflow-wrap: anywhere; }
.fpe-diff ins { text-decoration: none; font-weight: 620; color: var(--fpe-accent-ink);
  background: var(--fpe-accent-soft); border-radius: 4px; padding: 0 3px; }
.fpe-chips { gap: 6px !important; flex-wrap: wrap !important; }
.fpe-chips button, .fpe-chips .fpe-chip { flex: 0 0 auto !important; min-width: 0 !important; width: auto !important;
  min-height: 32px; padding: 4px 12px !important; border-radius: 999px !important; font-size: .85rem !important;
  font-weight: 500 !important; }
.fpe-window { padding: 2px 2px 4px; }
.fpe-window .top { display: flex; justify-content: space-between; font-size: .85rem; margin-bottom: 6px; }
.fpe-window .track { position: relative; height: 34px; }
.fpe-window .track::before, .fpe-window .track i { content: ""; position: absolute; top: 15px; height: 4px;
  border-radius: 2px; }
.fpe-window .track::before { left: 0; right: 0; background: var(--border-color-primary); }
.fpe-window .track i { left: calc(var(--a) * 100%); right: calc(100% - var(--b) * 100%);
  background: var(--fpe-accent); }
.fpe-window input { position: absolute; inset: 0; width: 100%; height: 34px; margin: 0; background: none;
  appearance: none; -webkit-appearance: none; pointer-events: none; }
.fpe-window input::-webkit-slider-thumb { -webkit-appearance: none; pointer-events: auto; width: 20px; height: 20px;
  border-radius: 50%; background: var(--background-fill-primary); border: 2px solid var(--fpe-accent); cursor: grab; }
.fpe-window input::-moz-range-thumb { pointer-events: auto; width: 16px; height: 16px; border-radius: 50%;
  background: var(--background-fill-primary); border: 2px solid var(--fpe-accent); cursor: grab; }
.fpe-window input:focus-visible { outline: none; }
.fpe-window input:focus-visible::-webkit-slider-thumb { box-shadow: 0 0 0 4px var(--fpe-accent-soft); }
.fpe-slider { margin: 0; max-width: 560px; }
.fpe-pair { position: relative; aspect-ratio: var(--ratio); border-radius: 12px; overflow: hidden;
  border: 1px solid var(--border-color-primary); }
.fpe-pair img { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; object-fit: fill; }
.fpe-pair img.over { clip-path: inset(0 0 0 var(--cut)); }
.fpe-pair i { position: absolute; top: 0; bottom: 0; left: var(--cut); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 0 1px rgba(0, 0, 0, .25); }
.fpe-slider input { width: 100%; margin: 12px 0 2px; accent-color: var(--fpe-accent); min-height: 24px; }
.fpe-slider figcaption { display: flex; justify-content: space-between; gap: 16px; font-size: .85rem;
  color: var(--body-text-color-subdued); }
.fpe-slider figcaption span { overflow-wrap: anywhere; }
.fpe-slider figcaption span:last-child { text-align: right; }
.fpe-note { margin: 2px 0; font-size: .9rem; color: var(--body-text-color-subdued); }
.fpe-alert { margin: 2px 0; padding: 10px 14px; border-radius: 8px; background: var(--fpe-alert-soft);
  color: var(--fpe-alert-ink); font-size: .92rem; overflow-wrap: anywhere; }
.fpe-progress progress { display: block; width: 100%; height: 6px; margin: 4px 0 8px; border: 0; border-radius: 3px;
  overflow: hidden; appearance: none; -webkit-appearance: none; background: var(--border-color-primary); }
.fpe-progress progress::-webkit-progress-bar { background: var(--border-color-primary); }
.fpe-progress progress::-webkit-progress-value { background: var(--fpe-accent); transition: width .2s; }
.fpe-progress progress::-moz-progress-bar { background: var(--fpe-accent); }
.fpe-tiles { list-style: none; display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 14px;
  margin: 0 !important; padding: 0 !important; }
.fpe-tiles li { margin: 0 !important; min-width: 0; }
.fpe-tiles figure { margin: 0; }
.fpe-tiles img { display: block; width: 100%; margin: 0 0 6px !important; border-radius: 8px;
  border: 1px solid var(--border-color-primary); }
.fpe-tiles a, .fpe-tiles button { display: block; width: 100%; padding: 0; border: 0; background: none; font: inherit;
  text-align: left; color: inherit; cursor: pointer; border-radius: 8px; }
.fpe-tiles a { text-decoration: none !important; color: inherit !important; font-weight: inherit !important; }
.fpe-tiles a:hover b { text-decoration: underline; }
.fpe-tiles figcaption { font-size: .82rem; line-height: 1.35; overflow-wrap: anywhere; }
.fpe-tiles figcaption b { display: block; font-weight: 600; }
.gradio-container button.label-wrap { min-height: 32px; align-items: center; }
.gradio-container button.fpe-dice { align-self: flex-end; }
.fpe-wide { grid-template-columns: 1fr !important; }
.fpe-progress span { font-size: .88rem; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.fpe-table { overflow-x: auto; max-width: 100%; }
.fpe-table table { border-collapse: collapse; font-size: .82rem; width: 100%; border: 0 !important;
  margin: 0 !important; }
.fpe-table th, .fpe-table td { border: 0 !important; padding: 7px 16px 7px 0 !important; text-align: left;
  vertical-align: top; white-space: nowrap; }
.fpe-table th { font-weight: 600; color: var(--body-text-color-subdued); }
.fpe-table thead, .fpe-table tbody, .fpe-table tr { border: 0 !important; }
.fpe-table td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 180px; }
.fpe-table tbody tr { border-top: 1px solid var(--border-color-primary) !important; }
.fpe-table td:nth-child(3) { font-family: var(--font-mono); font-size: .78rem; white-space: normal; min-width: 200px; }
.fpe-table td:nth-child(4), .fpe-table td:nth-child(5) { font-variant-numeric: tabular-nums; }
.fpe-memory { display: grid; gap: 4px; font-size: .86rem; }
.fpe-memory .bar { height: 10px; border-radius: 5px; background: var(--border-color-primary); width: 100%; }
.fpe-memory .bar.ours { background: var(--fpe-accent); }
.fpe-memory span { margin-bottom: 6px; }
#heat img, #components img { width: 100%; height: auto; max-height: none; cursor: crosshair; border-radius: 8px; }
#components img { cursor: default; image-rendering: pixelated; }
.gradio-container { --fpe-accent: #0d6e64; --fpe-accent-ink: #0a5d55; --fpe-accent-soft: #d9efec;
  --fpe-alert-soft: #fdecea; --fpe-alert-ink: #8c1d18; }
.dark .gradio-container, .gradio-container.dark, body.dark { --fpe-accent: #4fc1b4; --fpe-accent-ink: #86ded3;
  --fpe-accent-soft: #123f3a; --fpe-alert-soft: #43201e; --fpe-alert-ink: #ffb4ac; }
.gradio-container button:focus-visible, .gradio-container input:focus-visible,
.gradio-container textarea:focus-visible, .gradio-container [tabindex]:focus-visible {
  outline: 2px solid var(--fpe-accent); outline-offset: 2px; }
.gradio-container .cm-line, .gradio-container .cm-line span { color: var(--body-text-color) !important; }
footer { display: none !important; }
@media (max-width: 760px) {
  .gradio-container { padding: 0 12px 32px !important; }
  #desk { flex-direction: column; gap: 18px; }
  #desk > * { width: 100%; min-width: 0 !important; }
  #recipe { position: static; }
  .fpe-head { padding-top: 14px; }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
"""


#: Gradio puts a picture into a button, and says neither's name to who does not see it.
SCRIPT = """() => {
  const names = {
    "heat": "the picture with its heat; a click asks what a place attends to",
    "components": "principal components of self-attention",
    "photo-cut": "the photo",
    "photo-back": "the photo as it comes back",
  };
  const tell = () => Object.entries(names).forEach(([place, name]) =>
    document.querySelectorAll(`#${place} button:not([aria-label])`).forEach((b) => b.setAttribute("aria-label", name)));
  new MutationObserver(tell).observe(document.body, {childList: true, subtree: true});
  tell();
}"""


def theme() -> Any:
    """Gradio's plain theme with fonts that every system has."""
    import gradio as gr

    return gr.themes.Base(
        primary_hue=_teal(), neutral_hue="gray", font=_SANS, font_mono=_MONO, radius_size="md", text_size="md"
    ).set(
        body_background_fill="*neutral_50",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_700",
        block_border_width="1px",
        block_label_background_fill="transparent",
        button_primary_background_fill="#0d6e64",
        button_primary_background_fill_hover="#0a5d55",
        button_primary_background_fill_dark="#0d6e64",
        button_primary_text_color="white",
    )


def _teal() -> Any:
    import gradio as gr

    tones = (
        "eef8f6",
        "d9efec",
        "b0ddd7",
        "7cc5bc",
        "3fa498",
        "0d6e64",
        "0b635a",
        "0a5d55",
        "084b45",
        "063a35",
        "04211e",
    )
    return gr.themes.Color(*(f"#{tone}" for tone in tones))
