"use strict";
// All clips run on one clock, so that a row can be compared; without script they simply loop.
(() => {
  const videos = [...document.querySelectorAll("video")];
  const controls = document.querySelector(".controls");
  if (!controls) return;
  const button = controls.querySelector("button");
  const slider = controls.querySelector("input");
  const shown = controls.querySelector("output");
  const fps = Number(controls.dataset.fps);
  const frames = Number(slider.max) + 1;
  const length = frames / fps;
  let playing = true;
  let start = performance.now();

  const clock = () => ((performance.now() - start) / 1000) % length;
  const own = (video, time) => time % (video.duration || length);
  const show = (time) => {
    const frame = Math.min(Math.floor(time * fps), frames - 1);
    slider.value = frame;
    shown.value = `frame ${frame}`;
  };
  const play = () => {
    playing = true;
    start = performance.now() - ((Number(slider.value) / fps) % length) * 1000;
    for (const video of videos) {
      video.currentTime = own(video, clock());
      video.play().catch(() => {});
    }
    button.textContent = "Pause all";
  };
  const pause = () => {
    playing = false;
    for (const video of videos) video.pause();
    button.textContent = "Play all";
  };

  button.addEventListener("click", () => (playing ? pause() : play()));
  slider.addEventListener("input", () => {
    const frame = Number(slider.value);
    if (playing) pause();
    for (const video of videos) video.currentTime = own(video, (frame + 0.5) / fps);
    shown.value = `frame ${frame}`;
  });
  setInterval(() => {
    if (!playing) return;
    const time = clock();
    show(time);
    for (const video of videos) {
      if (video.paused || video.seeking) continue;
      const apart = Math.abs(video.currentTime - own(video, time));
      if (Math.min(apart, video.duration - apart) > 0.75 / fps) video.currentTime = own(video, time);
    }
  }, 125);
  controls.hidden = false;
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
    pause();
  } else if (!matchMedia("(pointer: coarse)").matches) {
    play(); // browsers wait until a clip is seen; phones, with few decoders, shall keep to that
  }
})();
