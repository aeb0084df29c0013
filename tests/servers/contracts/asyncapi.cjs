// Reads an AsyncAPI document with AsyncAPI's own parser: says what is wrong with it and exits 1, else tells what is in it.
"use strict";
const { Parser, fromFile } = require("@asyncapi/parser");

const [path] = process.argv.slice(2);
fromFile(new Parser(), path)
  .parse()
  .then(({ document, diagnostics }) => {
    // 0 is an error, 1 a warning; what is milder only advises, for example that there is a newer version of AsyncAPI.
    const wrong = diagnostics.filter(({ severity }) => severity <= 1);
    for (const { code, message, path, range } of wrong) {
      console.error(`${range.start.line + 1}: ${code}: ${message} (${path.join(".")})`);
    }
    if (!document || wrong.length) process.exit(1);
    const count = (all) => all.all().length;
    console.log(
      `AsyncAPI ${document.version()}: ${count(document.channels())} channels, ` +
        `${count(document.operations())} operations, ${count(document.messages())} messages`,
    );
  })
  .catch((error) => {
    console.error(error);
    process.exit(1);
  });
