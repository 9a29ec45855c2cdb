// caller AMQP_URL RACK
//
// takes calls from stdin, one JSON object a line: {"id", "method", "params", "timeoutMs", "key"}, any number at once, and
// prints {"id", "reply"} or {"id", "error"} for each as it is answered, and {"hint"} for each hint.
package main

import (
	"encoding/json"
	"errors"
	"io"
	"log"
	"os"
	"sync"
	"time"
)

type call struct {
	ID        int
	Method    string
	Params    json.RawMessage
	TimeoutMs int64
	Key       string
}

func main() {
	var writing sync.Mutex
	out := json.NewEncoder(os.Stdout)
	print := func(members map[string]any) {
		writing.Lock()
		defer writing.Unlock()
		out.Encode(members)
	}
	rack := &Rack{URL: os.Args[1], Name: os.Args[2], OnHint: func(hint json.RawMessage) { print(map[string]any{"hint": hint}) }}
	var calls sync.WaitGroup
	for in := json.NewDecoder(os.Stdin); ; {
		next := call{TimeoutMs: 30_000}
		if err := in.Decode(&next); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			log.Fatal(err)
		}
		calls.Add(1)
		go func() {
			defer calls.Done()
			if reply, err := rack.Call(next.Method, next.Params, time.Duration(next.TimeoutMs)*time.Millisecond, next.Key); err != nil {
				print(map[string]any{"id": next.ID, "error": err})
			} else {
				print(map[string]any{"id": next.ID, "reply": reply})
			}
		}()
	}
	calls.Wait()
}
