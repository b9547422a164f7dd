// The objectives of each model, from objectives.json, which `make up` writes from slo.yml, and what of a histogram keeps one.

import fs from 'fs';

// {default, models: those that have their own}, each with ttft_p95_seconds, itl_p95_seconds and availability; null where the file
// is not there.
function read() {
    try {
        return JSON.parse(fs.readFileSync(`${ngx.prefix}objectives.json`, 'utf8'));
    } catch (e) {
        return null;
    }
}

// The objective of a model, or null.
function of(model) {
    const all = read();
    return all && (Object.hasOwn(all.models, model) ? all.models[model] : all.default);
}

// How many values of a histogram are at most this one. `counts`: by bound, those up to it; between two bounds they are taken as
// evenly spread.
function within(counts, value) {
    const bounds = Object.keys(counts).map(Number).sort((one, other) => one - other);
    const above = bounds.findIndex((bound) => bound >= value);
    if (above < 0) {
        return 0;
    }
    const [low, high] = [above ? bounds[above - 1] : 0, bounds[above]];
    const below = above ? counts[low] : 0;
    return high === Infinity ? below : below + (counts[high] - below) * (value - low) / (high - low);
}

export default { of, within };
