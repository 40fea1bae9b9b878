"use strict";

// What the traces say: which tokens are held at which moment, and the figures made of that.
// A "pair" is one (layer, KV head); pair p is layer floor(p / heads), head p % heads.
// A "moment" is a position of the slider: how many tokens were generated, and the last compaction of every trace.

const METRICS = {
  age: {
    label: "mean age of what it holds",
    text: (value) => `${value.toFixed(1)} tokens`,
    explain: "how many tokens behind the newest the held ones stand, on average",
  },
  agreement: {
    label: "agreement with the majority",
    text: (value) => `${(100 * value).toFixed(1)}%`,
    explain: "of the tokens it holds, the share that more than half of all pairs hold too",
  },
  overlap: {
    label: "overlap with the other trace",
    text: (value) => `${(100 * value).toFixed(1)}%`,
    explain: "on the common start: tokens that both traces hold, of those that either holds",
  },
};

async function unpacked(text) {
  const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

async function readLives(epoch) {
  const buffer = await unpacked(epoch.lives);
  if (epoch.bytes === 1) return new Uint8Array(buffer);
  const view = new DataView(buffer);
  const wide = epoch.bytes === 4;
  return Uint32Array.from({ length: buffer.byteLength / epoch.bytes }, (_, i) =>
    wide ? view.getUint32(4 * i, true) : view.getUint16(2 * i, true));
}

/** What one trace holds at any moment. */
class Cache {
  constructor(raw, lives) {
    Object.assign(this, raw);
    this.pairs = raw.layers * raw.heads;
    this.length = raw.tokens.length;
    this.lives = lives;
    this.counts = raw.totals.map((_, index) => this.countsAfter(index + 1));
  }

  /** The epoch in which a compaction lies; before the first compaction, the first. */
  epochOf(compaction) {
    return this.epochs.findIndex((epoch) => compaction <= epoch.last);
  }

  /** Tokens that had been in the cache by a compaction. */
  total(compaction) {
    return compaction === 0 ? 0 : this.totals[compaction - 1];
  }

  generated(moment) {
    return Math.min(moment.length, this.length);
  }

  countsAfter(compaction) {
    const lives = this.lives[this.epochOf(compaction)];
    const counts = new Uint32Array(this.total(compaction));
    for (let token = 0, cell = 0; token < counts.length; token++) {
      for (const end = cell + this.pairs; cell < end; cell++) {
        counts[token] += lives[cell] === 0 || lives[cell] > compaction;
      }
    }
    return counts;
  }

  /** How many pairs hold a token; -1 if it is not generated yet. */
  count(token, compaction, length) {
    if (token >= length) return -1;
    return token < this.total(compaction) ? this.counts[compaction - 1][token] : this.pairs;
  }

  holds(token, pair, compaction) {
    return token >= this.total(compaction) || this.survives(token, pair, compaction);
  }

  survives(token, pair, compaction) {
    const life = this.lives[this.epochOf(compaction)][token * this.pairs + pair];
    return life === 0 || life > compaction;
  }

  /** The compaction that evicted a token from a pair, in the epoch of the given one; 0 if none did. */
  until(token, pair, compaction) {
    const index = this.epochOf(Math.max(compaction, 1));
    if (index < 0 || token >= this.epochs[index].width) return 0;
    return this.lives[index][token * this.pairs + pair];
  }
}

function numbers(cache, moment, compaction) {
  const length = cache.generated(moment);
  let sum = 0, all = 0, none = 0;
  for (let token = 0; token < length; token++) {
    const count = cache.count(token, compaction, length);
    sum += count;
    all += count === cache.pairs;
    none += count === 0;
  }
  const held = sum / cache.pairs;
  return { generated: length, held, evicted: length - held, all, none };
}

/** One figure for every pair. */
const heat = {
  age(cache, moment, compaction) {
    const length = cache.generated(moment);
    return perPair(cache, (pair) => {
      let sum = 0, held = 0;
      for (let token = 0; token < length; token++) {
        if (cache.holds(token, pair, compaction)) {
          sum += length - 1 - token;
          held++;
        }
      }
      return sum / held;
    });
  },

  agreement(cache, moment, compaction) {
    const length = cache.generated(moment);
    const major = Uint8Array.from({ length }, (_, token) => 2 * cache.count(token, compaction, length) > cache.pairs);
    return perPair(cache, (pair) => {
      let shared = 0, held = 0;
      for (let token = 0; token < length; token++) {
        if (cache.holds(token, pair, compaction)) {
          shared += major[token];
          held++;
        }
      }
      return shared / held;
    });
  },

  overlap(cache, moment) {
    return overlaps(moment).map(({ both, either }) => both / either);
  },
};

function perPair(cache, figure) {
  return Array.from({ length: cache.pairs }, (_, pair) => figure(pair));
}

/** For every pair, on the start that both traces have in common: tokens held by both traces, and by either. */
function overlaps(moment) {
  const [first, second] = caches;
  const length = Math.min(common, first.generated(moment), second.generated(moment));
  return perPair(first, (pair) => {
    let both = 0, either = 0;
    for (let token = 0; token < length; token++) {
      const left = first.holds(token, pair, moment.compactions[0]);
      const right = second.holds(token, pair, moment.compactions[1]);
      both += left && right;
      either += left || right;
    }
    return { both, either };
  });
}

/** The slider's positions: before the first compaction, then each length at which a trace was compacted. */
function allMoments() {
  if (caches.length === 1) {
    const { totals, length } = caches[0];
    return [totals[0] ?? length, ...totals].map((total, index) => ({ length: total, compactions: [index] }));
  }
  const lengths = [...new Set(caches.flatMap((cache) => cache.totals))].sort((a, b) => a - b);
  const start = { length: lengths[0] ?? Math.max(...caches.map((cache) => cache.length)), compactions: [0, 0] };
  const last = (cache, length) => 1 + cache.totals.findLastIndex((total) => total <= length);
  return [start, ...lengths.map((length) => ({ length, compactions: caches.map((cache) => last(cache, length)) }))];
}

function commonStart() {
  if (caches.length < 2) return 0;
  const [a, b] = caches.map((cache) => cache.ids);
  const different = a.findIndex((id, index) => id !== b[index]);
  return different < 0 ? a.length : different;
}
