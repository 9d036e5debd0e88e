// A client that does no more than releasectl's two requests to each agent, in Go: what scripts/bench.py measures beside.
//
// It reads a JSON array of addresses from standard input, says "ready", dispatches to each agent and asks until its task
// is done, 64 at once, one connection an agent, and prints the seconds that it took.
package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"sync"
	"time"
)

const inFlight = 64

type answer struct {
	Data struct {
		Status string `json:"status"`
	} `json:"data"`
}

func main() {
	port, serverName := os.Args[1], os.Args[2]
	input := bufio.NewReader(os.Stdin)
	line, err := input.ReadBytes('\n')
	check(err)
	var addresses []string
	check(json.Unmarshal(line, &addresses))
	config := tlsConfig(serverName)
	fmt.Println("ready")
	started := time.Now()
	waiting := make(chan string)
	var workers sync.WaitGroup
	for worker := 0; worker < inFlight; worker++ {
		workers.Add(1)
		go func() {
			defer workers.Done()
			for address := range waiting {
				send(config, address, port)
			}
		}()
	}
	for _, address := range addresses {
		waiting <- address
	}
	close(waiting)
	workers.Wait()
	fmt.Println(time.Since(started).Seconds())
	_, _ = input.ReadByte() // the process is looked at meanwhile
}

func tlsConfig(serverName string) *tls.Config {
	pair, err := tls.LoadX509KeyPair(os.Getenv("CONTROL_CERT"), os.Getenv("CONTROL_KEY"))
	check(err)
	ca, err := os.ReadFile(os.Getenv("CONTROL_CA"))
	check(err)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	return &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool, ServerName: serverName}
}

// One connection an agent, kept for the polls.
func send(config *tls.Config, address, port string) {
	transport := &http.Transport{TLSClientConfig: config, MaxConnsPerHost: 1}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: time.Minute}
	base := "https://" + address + ":" + port + "/tasks/"
	taskID := "apply_config_" + address + "_1_9f3a61c0"
	body, err := json.Marshal(map[string]any{"taskId": taskID, "type": "apply_config", "version": 1, "payload": map[string]any{}})
	check(err)
	reply, err := client.Post(base+"dispatch", "application/json", bytes.NewReader(body))
	check(err)
	read(reply)
	for {
		reply, err := client.Get(base + taskID)
		check(err)
		if read(reply).Data.Status == "success" {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func read(reply *http.Response) answer {
	defer reply.Body.Close()
	data, err := io.ReadAll(reply.Body)
	check(err)
	var found answer
	check(json.Unmarshal(data, &found))
	return found
}

func check(err error) {
	if err != nil {
		log.Fatal("bench_client: ", err)
	}
}
