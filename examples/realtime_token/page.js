"use strict";

const { app, sockets, asks } = document.body.dataset;
const at = (id) => document.getElementById(id);
at("app").value = app;
at("caller").hidden = asks !== "true";

let socket;
let timers = [];
let refreshed = 0;

function say(id, text, kind) {
  at(id).textContent = text;
  at(id).className = kind ?? "";
}

function note(text) {
  const line = document.createElement("li");
  const time = document.createElement("time");
  time.textContent = new Date().toLocaleTimeString();
  line.append(time, text);
  at("log").prepend(line);
  while (at("log").children.length > 100) at("log").lastChild.remove();
}

/** Asks this page's server for a token. */
async function ask(path) {
  const own = at("own").value;
  const headers = own ? { authorization: `Bearer ${own}` } : {};
  const answer = await fetch(`/api/fal/token?app=${encodeURIComponent(path)}`, { headers });
  const body = await answer.json();
  if (!answer.ok) {
    const wait = answer.headers.get("retry-after");
    throw new Error(`${answer.status}: ${body.message}${wait ? ` (after ${wait} s)` : ""}`);
  }
  return body;
}

/** Counts the life of a token down, and asks for the next one at nine tenths of it, as fal's own client does. */
function count(path, life) {
  timers.forEach(clearInterval);
  const ends = Date.now() + life * 1000;
  const show = () => say("token", `valid for ${Math.max(0, Math.round((ends - Date.now()) / 1000))} s or more`, "good");
  show();
  const refresh = async () => {
    try {
      const { expires_in } = await ask(path);
      refreshed += 1;
      say("refreshed", refreshed === 1 ? "once" : `${refreshed} times`);
      note("a new token, while the socket stays open");
      count(path, expires_in);
    } catch (error) {
      timers.forEach(clearInterval);
      say("token", "could not be refreshed", "bad");
      note(String(error.message ?? error));
    }
  };
  timers = [setInterval(show, 500), setTimeout(refresh, life * 900)];
}

at("open").addEventListener("submit", async (event) => {
  event.preventDefault();
  socket?.close();
  const path = `${at("app").value.trim()}/realtime`;
  let token;
  try {
    const answer = await ask(path);
    token = answer.token;
    note(`a token for ${path}, for ${answer.expires_in} s`);
    count(path, answer.expires_in);
  } catch (error) {
    say("token", "refused", "bad");
    note(String(error.message ?? error));
    return;
  }
  const opened = new WebSocket(`${sockets}/${path}?fal_jwt_token=${encodeURIComponent(token)}`);
  socket = opened;
  say("socket", "opening");
  opened.addEventListener("open", () => {
    say("socket", "open", "good");
    at("sends").disabled = false;
    note("the socket is open");
    at("send").requestSubmit();
  });
  opened.addEventListener("message", ({ data }) => note(`← ${data}`));
  opened.addEventListener("close", () => {
    if (socket !== opened) return;
    timers.forEach(clearInterval);
    say("socket", "closed", "bad");
    at("sends").disabled = true;
    note("the socket is closed");
  });
});

at("send").addEventListener("submit", (event) => {
  event.preventDefault();
  const input = JSON.stringify({ prompt: at("prompt").value });
  socket.send(input);
  note(`→ ${input}`);
});
