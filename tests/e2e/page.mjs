// A page with fal's own client in a headless Chromium. Each line of standard input is one JSON string: the body of an
// async function, which is run in the page. Each line of standard output is its result: {"ok":…} or {"error":…}.
//
// node page.mjs ORIGIN FAL: the page is of the origin of the proxy, and fal's hosts lead to FAL, an address with TLS.
// node page.mjs ORIGIN: the page is the one at ORIGIN itself, as on a phone.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

const [origin, fal] = process.argv.slice(2);

/** The client and what it needs as one script. The client consists of CommonJS modules, which no browser loads. */
function bundle(name) {
  const modules = {};
  const add = (from, wanted) => {
    const file = createRequire(from).resolve(wanted);
    if (modules[file]) return file;
    const text = readFileSync(file, "utf8");
    const names = {};
    modules[file] = { text: file.endsWith(".json") ? `module.exports = ${text}` : text, names };
    for (const [, wanted] of text.matchAll(/\brequire\(["']([^"']+)["']\)/g)) names[wanted] = add(file, wanted);
    return file;
  };
  const main = add(import.meta.filename, name);
  const functions = Object.entries(modules).map(
    ([file, { text, names }]) =>
      `${JSON.stringify(file)}: [${JSON.stringify(names)}, function (module, exports, require) {${text.replace(/\/\/# source.*/g, "")}\n}]`,
  );
  return `
    const modules = {${functions.join(",\n")}};
    const made = {};
    function load(file) {
      const [names, make] = modules[file];
      if (!made[file]) {
        made[file] = { exports: {} };
        make(made[file], made[file].exports, (wanted) => load(names[wanted]));
      }
      return made[file].exports;
    }
    globalThis.fal = load(${JSON.stringify(main)}).fal;`;
}

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    // The page comes from this script, so Chromium does not know that it is of this machine, as the servers are.
    "--disable-features=LocalNetworkAccessChecks",
    ...(fal ? [`--host-resolver-rules=MAP fal.run:443 ${fal}, MAP v3.fal.media:443 ${fal}`] : []),
  ],
});
// The certificate of the storage is that of a CA which no browser knows. The proxy checks its own connections.
const context = await browser.newContext({ ignoreHTTPSErrors: true, viewport: { width: 390, height: 844 } });
const page = await context.newPage();
page.on("pageerror", (error) => console.error(String(error)));
if (fal) {
  const body = "<!doctype html><title>e2e</title>";
  await page.route(`${origin}/e2e`, (route) => route.fulfill({ contentType: "text/html", body }));
  await page.goto(`${origin}/e2e`);
  await page.addScriptTag({ content: bundle("@fal-ai/client") });
} else {
  await page.goto(origin);
}
console.log(JSON.stringify({ ok: "ready" }));

for await (const line of createInterface({ input: process.stdin })) {
  const result = await page.evaluate(async (body) => {
    const run = new (async () => {}).constructor(body);
    try {
      return { ok: (await run()) ?? null };
    } catch (error) {
      const { name, message, status, body, requestId } = error;
      return { error: { name, message, status, body, requestId } };
    }
  }, JSON.parse(line));
  console.log(JSON.stringify(result));
}
await browser.close();
