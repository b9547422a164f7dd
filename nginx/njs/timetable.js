// The hours at which models are to be awake, from the setting AWAKE: "qwen=Mon-Fri 08:00-18:00; qwen=Sat 10:00-14:00". It is
// the timetable that autoscaler/timetable.py describes and `make up` checks. All times are UTC: Nginx' images know no time zones.

const DAYS = ['Mon', 'Tue', 'Wed', 'Thu', 'Fri', 'Sat', 'Sun'];
const DAY = 24 * 60;   // minutes
const WEEK = 7 * DAY;
const ENTRY = /^([^=;]+?)\s*=\s*([A-Za-z,-]+)\s+(\d\d):(\d\d)-(\d\d):(\d\d)$/;

// The days that `Mon-Fri` or `Sat,Sun` names, Monday is 0; null where one is none.
function daysOf(text) {
    const found = new Set();
    for (const part of text.split(',')) {
        const ends = part.split('-').map((name) => DAYS.indexOf(name));
        if (ends.length > 2 || ends.includes(-1)) {
            return null;
        }
        const last = ends[ends.length - 1];
        for (let day = ends[0]; found.add(day) && day !== last; day = (day + 1) % 7) {
            // all between
        }
    }
    return [...found];
}

// The minutes of the week, from Monday 00:00 on, at which an entry begins and ends, for each of its days; null where it is none.
function spanned(days, hour, minute, toHour, toMinute) {
    const [begin, end] = [60 * hour + Number(minute), 60 * toHour + Number(toMinute)];
    const named = daysOf(days);
    if (!named || minute > 59 || toMinute > 59 || begin >= DAY || end > DAY || begin === end) {
        return null;
    }
    return named.map((day) => [day * DAY + begin, day * DAY + end + (end < begin ? DAY : 0)]);
}

// {models: the spans of each, wrong: the entries that are none, which are left out}.
function parse(text) {
    const models = Object.create(null);
    const wrong = [];
    for (const entry of text.split(';').map((one) => one.trim()).filter((one) => one)) {
        const [, model, ...times] = ENTRY.exec(entry) || [];
        const spans = model && spanned(...times);
        if (spans) {
            models[model] = (models[model] || []).concat(spans);
        } else {
            wrong.push(entry);
        }
    }
    return { models, wrong };
}

// The minute of the week at a time in milliseconds since 1970, which began on a Thursday.
function minuteOf(time) {
    return (Math.floor(time / 60000) + 3 * DAY) % WEEK;
}

// Whether a model of this timetable is to be awake at this minute of the week.
function has(models, model, minute) {
    return (models[model] || []).some(([from, to]) => from <= minute && minute < to || minute + WEEK < to);
}

export default { parse, minuteOf, has };
