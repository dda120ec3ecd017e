"use strict";
(() => {
  // Pixels; more than any vision tower here reads. A phone's photo shrinks from 5 MB to 0.5 MB.
  const MAX_SIDE = 1536;
  // A smaller file is sent as it is, so that the model reads the original pixels.
  const MAX_PLAIN_BYTES = 2_000_000;
  const PLAIN_TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];
  const find = (id) => document.getElementById(id);
  const [question, turnsList, notice] = ["question", "turns", "notice"].map(find);

  let images = []; // {uri, note, turn}: a data URI, its name and size, the question it goes with
  let turns = []; // {role, text}: the conversation so far, as the model reads it
  let running = null; // AbortController of the answer that is being written
  let model = "";
  let key = ""; // kept only in this page
  let waiting = null; // function to call once there is a key

  const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});

  function say(sentence) {
    notice.textContent = sentence;
    notice.hidden = !sentence;
  }

  class Refused extends Error {}

  async function refuse(response) {
    let sentence = `The server answered with status ${response.status}.`;
    try {
      const { error } = await response.json();
      sentence = error?.message || sentence;
    } catch { /* not JSON: only the status is known */ }
    const refused = new Refused(sentence);
    refused.status = response.status;
    throw refused;
  }

  async function request(path, options = {}) {
    let response;
    try {
      response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The server cannot be reached. Is it still running?");
    }
    return response.ok ? response : refuse(response);
  }

  function askForKey(then) {
    waiting = then;
    say(key ? "The server does not accept this key." : "");
    find("lock").hidden = false;
    find("key").focus();
  }

  async function learnModel() {
    const { data } = await (await request("/v1/models")).json();
    if (!data?.length) throw new Refused("The server has no model.");
    model = data[0].id;
    find("model").textContent = model;
    document.title = `${model}: ask about an image`;
  }

  async function start() {
    try {
      await learnModel();
    } catch (error) {
      if (error.status === 401) askForKey(start);
      else say(error.message);
    }
  }

  // The image

  function load(url) {
    const image = new Image();
    image.src = url;
    return image.decode().then(() => image);
  }

  const dataUri = (blob) => new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });

  /** Returns small files as they are. Others are drawn on a canvas, which makes them smaller and
      upright, and reads formats that only the browser knows. */
  async function prepare(file) {
    const address = URL.createObjectURL(file);
    try {
      const image = await load(address);
      const [width, height] = [image.naturalWidth || MAX_SIDE, image.naturalHeight || MAX_SIDE];
      const scale = Math.min(1, MAX_SIDE / Math.max(width, height));
      if (scale === 1 && file.size <= MAX_PLAIN_BYTES && PLAIN_TYPES.includes(file.type)) {
        return { uri: await dataUri(file), width, height };
      }

      const canvas = document.createElement("canvas");
      canvas.width = Math.max(1, Math.round(width * scale));
      canvas.height = Math.max(1, Math.round(height * scale));
      const paper = canvas.getContext("2d");
      paper.fillStyle = "#fff";
      paper.fillRect(0, 0, canvas.width, canvas.height);
      paper.imageSmoothingQuality = "high";
      paper.drawImage(image, 0, 0, canvas.width, canvas.height);
      const drawn = (type) => new Promise((resolve) => canvas.toBlob(resolve, type, 0.92));
      // PNG keeps drawings and text sharp; JPEG keeps photos small.
      let blob = file.type === "image/jpeg" ? null : await drawn("image/png");
      if (!blob || blob.size > MAX_PLAIN_BYTES) blob = await drawn("image/jpeg");
      return { uri: await dataUri(blob), width: canvas.width, height: canvas.height };
    } finally {
      URL.revokeObjectURL(address);
    }
  }

  async function take(file) {
    say("");
    let prepared;
    try {
      prepared = await prepare(file);
    } catch {
      const name = file.name || "This file";
      say(`${name} is not an image that this browser can read: use PNG, JPEG or WebP.`);
      return;
    }
    const name = file.name || "pasted image";
    const note = `${name}, ${prepared.width} × ${prepared.height}`;
    const turn = turns.length + (running ? 2 : 0); // after the answer that is being written
    images.push({ uri: prepared.uri, note, turn });
    const preview = element("img", "");
    preview.src = prepared.uri;
    preview.alt = `Image ${images.length}: ${name}`;
    find("previews").append(preview);
    find("caption").textContent = images.map((one) => one.note).join("; ");
    find("shown").hidden = false;
    find("empty").hidden = true;
    find("again").hidden = false;
    document.body.classList.add("started");
    question.focus();
  }

  function clear() {
    running?.abort();
    images = [];
    turns = [];
    turnsList.replaceChildren();
    find("previews").replaceChildren();
    find("caption").textContent = "";
    find("shown").hidden = true;
    find("empty").hidden = false;
    find("again").hidden = true;
    document.body.classList.remove("started");
    say("");
  }

  /** Takes all images among files, one after another; a single file is tried whatever it is. */
  const takeAll = (files) => {
    const found = [...files].filter((one) => one.type.startsWith("image/"));
    const taken = found.length ? found : [...files].slice(0, 1);
    taken.reduce((before, file) => before.then(() => take(file)), Promise.resolve());
    return taken.length > 0;
  };

  for (const [button, input] of [["choose", "file"], ["more", "file"], ["photograph", "camera"]]) {
    find(button).addEventListener("click", () => find(input).click());
  }
  for (const input of ["file", "camera"]) {
    find(input).addEventListener("change", (event) => {
      takeAll(event.target.files);
      event.target.value = ""; // so that the same file can be chosen again
    });
  }
  find("again").addEventListener("click", () => {
    clear();
    find("choose").focus();
  });
  document.addEventListener("paste", (event) => {
    const files = event.clipboardData?.files;
    if (files?.length && takeAll(files)) event.preventDefault();
  });
  const drop = find("drop");
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) drop.hidden = true;
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.hidden = true;
    if (!takeAll(event.dataTransfer.files)) {
      say("That was not a file: save the image first, then drop it here.");
    }
  });

  // The conversation

  function element(name, className, text = "") {
    const made = document.createElement(name);
    made.className = className;
    made.textContent = text;
    return made;
  }

  function append(role, text) {
    const item = element("li", role);
    item.append(element("span", "unseen", role === "user" ? "You: " : "Answer: "));
    const said = element("div", "said", text);
    item.append(said);
    turnsList.append(item);
    item.scrollIntoView({ block: "end" });
    return { item, said };
  }

  function link(label, action) {
    const button = element("button", "link", label);
    button.type = "button";
    button.addEventListener("click", () => action(button));
    return button;
  }

  async function copy(text, button) {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // only pages from https or localhost may use the clipboard
      const area = element("textarea", "unseen", text);
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }

  const plain = ({ role, text }) => ({ role, content: text });

  /** Returns the messages; images stand in front of the question that they came with. */
  function messages(asked) {
    return [...turns, { role: "user", text: asked }].map(plain).map((message, place) => {
      const shown = images.filter(({ turn }) => turn === place);
      if (!shown.length) return message;
      const parts = shown.map(({ uri }) => ({ type: "image_url", image_url: { url: uri } }));
      return { ...message, content: [...parts, { type: "text", text: message.content }] };
    });
  }

  /** Yields the events of a chat completion's stream. Source: WHATWG, server-sent events. */
  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  }

  function busy(controller) {
    running = controller;
    find("send").hidden = Boolean(controller);
    find("stop").hidden = !controller;
  }

  async function ask(asked) {
    const { item: mine } = append("user", asked);
    const { item, said } = append("assistant", "");
    const controller = new AbortController();
    let [text, ending, failure] = ["", "", null];
    busy(controller);
    said.classList.add("waiting");
    item.setAttribute("aria-busy", "true");
    try {
      if (!model) await learnModel();
      const response = await request("/v1/chat/completions", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ model, messages: messages(asked), stream: true }),
        signal: controller.signal,
      });
      for await (const event of events(response)) {
        if (event.error) throw new Refused(event.error.message);
        const choice = event.choices?.[0];
        text += choice?.delta?.content || "";
        ending = choice?.finish_reason || ending;
        const talk = find("talk");
        const list = talk.scrollHeight > talk.clientHeight ? talk : find("main");
        const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
        said.textContent = text;
        if (atEnd) list.scrollTop = list.scrollHeight;
      }
      if (!ending) {
        throw new Refused("The answer is incomplete: the connection to the server was lost.");
      }
    } catch (error) {
      if (controller.signal.aborted) ending = "stopped";
      else if (error instanceof Refused) failure = error;
      else failure = new Refused(`The answer cannot be read: ${error.message}`);
    }
    said.classList.remove("waiting");
    item.removeAttribute("aria-busy");
    if (running === controller) busy(null);
    if (!mine.isConnected) return; // the user chose a new image meanwhile
    const tools = element("div", "tools grey");
    if (failure?.status === 401) {
      mine.remove();
      item.remove();
      askForKey(() => ask(asked));
      return;
    }
    if (failure) {
      said.classList.add("failed");
      said.textContent = (text ? `${text}\n\n` : "") + failure.message;
      tools.append(link("Try again", () => {
        if (running) return;
        mine.remove();
        item.remove();
        ask(asked);
      }));
    } else if (text.trim()) {
      turns.push({ role: "user", text: asked }, { role: "assistant", text });
      tools.append(link("Copy", (button) => copy(text, button)));
    } else {
      said.textContent = "(no answer)"; // the turn is not sent again
    }
    if (ending === "stopped") tools.append("stopped");
    if (ending === "length") tools.append("cut off at the longest answer");
    item.append(tools);
    item.scrollIntoView({ block: "nearest" });
  }

  // Keys and forms

  function fit() {
    question.style.height = "auto";
    question.style.height = `${question.scrollHeight + 2}px`;
    find("send").disabled = !question.value.trim();
  }
  question.addEventListener("input", fit);
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    find("composer").requestSubmit();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  find("stop").addEventListener("click", () => {
    running?.abort();
    question.focus();
  });
  find("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const asked = question.value.trim();
    if (!asked || running) return;
    say("");
    document.body.classList.add("started");
    find("again").hidden = false;
    question.value = "";
    fit();
    ask(asked);
  });
  find("lock").addEventListener("submit", (event) => {
    event.preventDefault();
    key = find("key").value.trim();
    find("key").value = "";
    find("lock").hidden = true;
    say("");
    question.focus();
    waiting?.();
  });
  start();
})();
