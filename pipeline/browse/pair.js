"use strict";
// Draws one pair. Texts become text nodes and nothing else.
browse.drawPair = (() => {
  const BOUNDS = [0.1, 1, 3, 6]; // nats below 0 at which the next colour begins
  const SCALE = ["above −0.1", "−0.1 to −1", "−1 to −3", "−3 to −6", "below −6"];
  const MINUS = "−";

  const number = (value, digits = 2) =>
    value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", MINUS);
  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const level = (logp) => BOUNDS.filter((bound) => -logp >= bound).length;
  // What has no shape of its own is named: white space, and marks that would turn the direction of what follows.
  const code = (text) => [...text].map((c) => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`).join(" ");
  const INVISIBLE = /^[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]+$/u;
  const TURNING = /([\u202a-\u202e\u2066-\u2069])/u;

  /** `text` in an element of its own, with the marks that would turn its direction named and shut in. */
  const data = (tag, attributes, text) =>
    element(tag, attributes, ...text.split(TURNING).map((part) =>
      TURNING.test(part) ? element("span", { class: "mark", "data-code": code(part) }, part) : part));

  /** The tokens of a response as {text, logps, first}: `first` is the number of the first of its tokens. */
  const piecesOf = (text, { lengths, logps }, readings) => {
    const pieces = [];
    let at = 0;
    lengths.forEach((length, index) => {
      const logp = logps && logps[index] / 1000;
      if (length < 0) pieces.at(-1).logps.push(logp);
      else pieces.push({ text: text.slice(at, (at += length)), logps: [logp], first: index });
    });
    for (const piece of pieces)
      piece.readings = readings.map(([name, read]) => {
        const own = read.logps.slice(piece.first, piece.first + piece.logps.length);
        return [name, own.reduce((a, b) => a + b, 0) / 1000];
      });
    return pieces;
  };

  const say = (piece, count) => {
    const shown = INVISIBLE.test(piece.text) ? code(piece.text) : piece.text === "" ? "no text" : JSON.stringify(piece.text);
    const last = piece.first + piece.logps.length;
    const place = piece.logps.length === 1 ? `token ${last}` : `tokens ${piece.first + 1} to ${last}, which make one character`;
    const sum = piece.logps.reduce((a, b) => a + b, 0);
    const value = piece.logps[0] === null ? "no log-prob stored" : `${piece.logps.map((l) => number(l, 3)).join(", ")} nats`;
    const share = piece.logps[0] === null ? "" : `, probability ${Math.exp(sum).toPrecision(2)}`;
    const read = piece.readings.map(([name, logp]) =>
      `; ${name}: ${number(logp, 3)} nats${piece.logps[0] === null ? "" : `, log-ratio ${number(logp - sum, 3)}`}`);
    return `${shown}: ${place} of ${count}, ${value}${share}${read.join("")}`;
  };

  const tip = element("div", { id: "tip", role: "tooltip", hidden: "" });
  document.body.append(tip);
  const point = (event, words) => {
    tip.textContent = words;
    tip.hidden = false;
    const x = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8);
    const below = event.clientY + 18;
    const y = below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 10 : below;
    tip.style.left = `${Math.max(0, x)}px`;
    tip.style.top = `${Math.max(0, y)}px`;
  };

  /** The coloured text, read with the pointer or, once it has the focus, with the arrow keys. */
  const tokensBox = (side, text, stored, readings) => {
    const pieces = piecesOf(text, stored, readings);
    const count = stored.lengths.length;
    const reading = element("p", { class: "reading", role: "status" }, "Point at a token, or move here with Tab and use the arrow keys.");
    const box = element("div", { class: "text tokens", tabindex: "0", role: "group", dir: "auto",
      "aria-label": `${side} response, token by token` });
    const spans = pieces.map((piece) => {
      const least = piece.logps[0] === null ? 0 : level(piece.logps.reduce((a, b) => a + b, 0));
      const span = element("span", { class: `token s${least}` }, piece.text);
      if (piece.text === "") span.classList.add("blank");
      else if (/^\s*\n/.test(piece.text)) span.classList.add("break");
      else if (INVISIBLE.test(piece.text)) {
        span.classList.add("mark");
        span.dataset.code = code(piece.text);
      } else if (TURNING.test(piece.text)) span.classList.add("mark");
      return span;
    });
    box.append(...spans);
    let at = -1;
    const show = (next) => {
      spans[at]?.classList.remove("shown");
      at = Math.max(0, Math.min(spans.length - 1, next));
      spans[at].classList.add("shown");
      spans[at].scrollIntoView({ block: "nearest" });
      reading.textContent = say(pieces[at], count);
    };
    box.addEventListener("keydown", (event) => {
      const next = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + 10, ArrowUp: at - 10, Home: 0, End: spans.length - 1 }[event.key];
      if (next === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      event.stopPropagation();
      show(next);
    });
    box.addEventListener("pointermove", (event) => {
      const hit = spans.indexOf(event.target.closest(".token"));
      if (hit >= 0) point(event, say(pieces[hit], count));
      else tip.hidden = true;
    });
    box.addEventListener("pointerleave", () => (tip.hidden = true));
    box.addEventListener("click", (event) => {
      const hit = spans.indexOf(event.target.closest(".token"));
      if (hit >= 0) show(hit);
    });
    return [box, reading];
  };

  const KINDS = {
    response: "Also in {n} of this prompt",
    opposed: "On the other side in {n}",
    text: "Same text under another prompt in {n}",
  };
  const othersLine = (words, [count, ids]) => {
    const line = element("p", { class: "facts others" }, `${words.replace("{n}", count === 1 ? "1 other pair" : `${count} other pairs`)}: `);
    for (const id of ids) line.append(browse.rowOf(id) === undefined ? `${id} (not on this page) ` : element("a", { href: `#pair=${id}` }, String(id)), " ");
    if (count > ids.length) line.append("…");
    return line;
  };

  const response = (side, pair) => {
    const stored = pair.tokens[side];
    const count = stored.lengths.length;
    const facts = [`${count} ${count === 1 ? "token" : "tokens"}`];
    if (stored.logps === null) facts.push("no row in the reference cache");
    else facts.push(`log-prob ${number(stored.sum)} nats, ${number(stored.sum / count, 3)} per token`);
    if (stored.reward !== null) facts.push(`reward ${number(stored.reward, 3)}`);
    if (stored.truncated) facts.push("cut at the token limit");
    const card = element("section", { class: "card", id: side, "aria-label": `${side} response` },
      element("h3", {}, side === "chosen" ? "Chosen" : "Rejected"),
      element("p", { class: stored.logps === null ? "facts missing" : "facts" }, facts.join(" · ")));
    const readings = Object.entries(pair.tokens.policies).flatMap(([name, sides]) => (sides[side] ? [[name, sides[side]]] : []));
    for (const [name, read] of readings) {
      const ratio = stored.sum === null ? "" : `, log-ratio ${number(read.sum - stored.sum)}`;
      card.append(element("p", { class: "facts policy" }, `${name}: log-prob ${number(read.sum)} nats${ratio}`));
    }
    card.append(...tokensBox(side, pair[side], stored, readings));
    for (const [kind, words] of Object.entries(KINDS))
      if (pair.tokens.others[`${side} ${kind}`]) card.append(othersLine(words, pair.tokens.others[`${side} ${kind}`]));
    return card;
  };

  const answers = (cell, rows) => {
    const details = element("details", { class: "card" }, element("summary", {}, `Sampled answers of ${cell}, and of the reference (${rows.length})`));
    for (const [author, text, count, policy, reference, reward] of rows) {
      const ratio = policy === null || reference === null ? null : policy - reference;
      const facts = `${author} · ${count} tokens · log-prob ${number(policy)} under the policy, ${number(reference)} under the reference, log-ratio ${number(ratio)} nats`;
      details.append(element("div", { class: "answer" },
        element("p", { class: "facts" }, reward === null ? facts : `${facts} · true reward ${number(reward, 3)}`),
        data("p", { class: "text", dir: "auto" }, text)));
    }
    return details;
  };

  /** How far each policy moved the margin from the reference's; beta times that is the margin of implicit rewards. */
  const moved = ({ chosen, rejected, policies }) =>
    Object.entries(policies).flatMap(([name, read]) => {
      if (!read.chosen || !read.rejected || chosen.sum === null || rejected.sum === null) return [];
      const margin = read.chosen.sum - read.rejected.sum;
      const change = number(margin - (chosen.sum - rejected.sum));
      return [element("p", { class: "facts policy" }, `${name}: margin ${number(margin)} nats, change ${change}`)];
    });

  const scale = () => {
    const list = element("ul", { class: "scale", "aria-label": "Log-prob of a token, nats" });
    SCALE.forEach((words, index) => list.append(element("li", {}, element("span", { class: `token s${index}` }, "token"), ` ${words}`)));
    return list;
  };

  /** facts: the pair's row of the index, as {id, split, category, margin, token_margin}. */
  return (place, facts, pair) => {
    tip.hidden = true;
    const margin = facts.margin === null ? "no margin: a log-prob is missing"
      : `margin ${number(facts.margin)} nats, ${number(facts.token_margin, 3)} per token`;
    const about = [facts.split, facts.category, pair.source].filter((part) => part !== null);
    const prompt = element("section", { class: "card", id: "prompt", "aria-label": "Prompt" },
      element("h3", {}, "Prompt"), data("p", { class: "text", dir: "auto" }, pair.prompt));
    if (pair.tokens.others.prompt) prompt.append(othersLine("Same prompt in {n}", pair.tokens.others.prompt));
    place.replaceChildren(
      element("h2", {}, `Pair ${facts.id}`), element("p", { class: "facts" }, ...about.flatMap((part) => [data("bdi", {}, part), " · "]), margin), ...moved(pair.tokens), prompt, scale(),
      element("div", { class: "responses" }, response("chosen", pair), response("rejected", pair)),
      ...Object.entries(pair.tokens.answers).map(([cell, rows]) => answers(cell, rows)));
  };
})();
