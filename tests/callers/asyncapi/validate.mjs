//   node validate.mjs DOCUMENT
//
// prints what the parser of the standard has to say about an AsyncAPI document, one JSON object a line.
import { readFileSync } from 'node:fs'
import { Parser } from '@asyncapi/parser'

const { document, diagnostics } = await new Parser().parse(readFileSync(process.argv[2], 'utf8'))
for (const { severity, code, message, path } of diagnostics) {
  console.log(JSON.stringify({ severity, code, message, path: path.join('.') }))
}
console.log(JSON.stringify({ operations: document?.allOperations().all().map((operation) => operation.id()) ?? [] }))
