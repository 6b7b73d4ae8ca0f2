"use strict";
// What the data files hand over, and how they are asked for: a page from a disk may load nothing but scripts.
const browse = (() => {
  const waiting = new Map(); // file -> what to call with its entries
  const kept = new Map(); // file of tokens -> promise of its entries; the last few
  const KEPT = 8;
  const texts = []; // by file, promise of [prompt, chosen, rejected, source] a pair: the search needs all of them

  const load = (kind, number) =>
    new Promise((resolve, reject) => {
      const name = `data/${kind}-${String(number).padStart(5, "0")}.js`;
      const script = document.createElement("script");
      waiting.set(`${kind} ${number}`, resolve);
      script.src = name;
      script.addEventListener("load", () => script.remove());
      script.addEventListener("error", () => reject(new Error(`${name} cannot be loaded; run refcache browse again`)));
      document.head.append(script);
    });
  const arrive = (kind) => (number, entries) => {
    waiting.get(`${kind} ${number}`)?.(entries);
    waiting.delete(`${kind} ${number}`);
  };

  return {
    index(index) {
      browse.facts = index;
      browse.start(index);
    },
    texts: arrive("texts"),
    tokens: arrive("tokens"),

    /** Texts of file `number`: [prompt, chosen, rejected, source] of each pair. */
    textsOf(number) {
      texts[number] ??= load("texts", number);
      return texts[number];
    },

    /** Tokens of file `number`, an object a pair. */
    tokensOf(number) {
      const found = kept.get(number) ?? load("tokens", number);
      kept.delete(number);
      kept.set(number, found); // the youngest last
      if (kept.size > KEPT) kept.delete(kept.keys().next().value);
      return found;
    },

    /** One pair by its row of the index. */
    async pair(row) {
      const size = browse.facts.pairs_a_file;
      const [number, place] = [Math.floor(row / size), row % size];
      const [some, tokens] = await Promise.all([browse.textsOf(number), browse.tokensOf(number)]);
      const [prompt, chosen, rejected, source] = some[place];
      return { prompt, chosen, rejected, source, tokens: tokens[place] };
    },
  };
})();
