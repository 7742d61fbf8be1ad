// The words that two texts have in common, by the longest common subsequence.

const MAX_CELLS = 9e6; // of the table, two bytes each

/** Pieces {text, same} of both texts, in order, and the share of words in common (0 to 1). */
export function diffWords(left, right) {
  const a = split(left);
  const b = split(right);
  const [inA, inB] = common(a.map((each) => each.trim()), b.map((each) => each.trim()));
  const shared = inA.reduce((sum, same) => sum + same, 0);
  const longest = Math.max(a.length, b.length);
  return { left: pieces(a, inA), right: pieces(b, inB), share: longest ? shared / longest : 1 };
}

/** Words, each with the white space after it; that at the beginning belongs to the first. */
function split(text) {
  return text.match(/^\s*\S+\s*|\S+\s*/g) ?? [];
}

function pieces(words, marks) {
  const joined = [];
  words.forEach((text, index) => {
    const same = marks[index] === 1;
    if (joined.length && joined.at(-1).same === same) joined.at(-1).text += text;
    else joined.push({ text, same });
  });
  return joined;
}

/** For each word of both lists, 1 if it belongs to what they have in common. */
function common(a, b) {
  const inA = new Uint8Array(a.length);
  const inB = new Uint8Array(b.length);
  let start = 0;
  let endA = a.length;
  let endB = b.length;
  while (start < endA && start < endB && a[start] === b[start]) {
    inA[start] = inB[start] = 1;
    start += 1;
  }
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) inA[--endA] = inB[--endB] = 1;
  const rows = endA - start;
  const width = endB - start + 1;
  if ((rows + 1) * width > MAX_CELLS) return [inA, inB]; // what lies between counts as different
  const lengths = new Uint16Array((rows + 1) * width); // of the tails
  for (let i = rows - 1; i >= 0; i--) {
    for (let j = width - 2; j >= 0; j--) {
      lengths[i * width + j] = a[start + i] === b[start + j]
        ? lengths[(i + 1) * width + j + 1] + 1
        : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
    }
  }
  for (let i = 0, j = 0; i < rows && j < width - 1;) {
    if (a[start + i] === b[start + j]) inA[start + i++] = inB[start + j++] = 1;
    else if (lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return [inA, inB];
}
